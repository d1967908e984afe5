"""The stack: what `run` returns, how its program grows, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import random_model

import jexit
from jexit.config import Execution, ExitSettings, LoRA
from jexit.model.exits import depth_log_prob
from jexit.model.transformer import exit_hidden_states, logits_of, run
from tolerances import GRADIENT, relative_error

EXITS, LAYERS = (1, 2, 4), 5


ADAPTERS = LoRA(rank=2, alpha=4.0, targets=("q", "k", "down"))


run_jit = nnx.jit(run, static_argnames=("hazards", "residual_layers", "keys_values"))


def loss_of(graphdef, tokens_BT, depth_BT, execution=Execution()):
    """Next-token loss plus −log P(depths), as a function of the parameters; all of them matter."""

    def loss(state):
        model = nnx.merge(graphdef, state)
        model.execution = execution
        out = run(model, tokens_BT, policy=jexit.Prescribed(depth_BT), hazards=True)
        logits = logits_of(out.hidden_BTD[:, :-1], model.head_VD)
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens_BT[:, 1:, None], -1)
        law = depth_log_prob(depth_BT, out.hazard_logits_BTE, EXITS, LAYERS)
        return -logprobs.mean() - law.mean()

    return loss


def test_positions_and_masks_make_left_padding_equal_right_padding(model, tokens_BT):
    """The engine pads prompts on the left: same hidden states, whatever the padding holds."""
    length = 5
    right = run_jit(model, tokens_BT, valid_BT=jnp.arange(8)[None] < length)
    left_BT = jnp.concatenate([tokens_BT[:, length:], tokens_BT[:, :length]], axis=1)
    shift = 8 - length
    left = run_jit(
        model,
        left_BT,
        positions_BT=jnp.broadcast_to(jnp.maximum(jnp.arange(8) - shift, 0), (3, 8)),
        valid_BT=jnp.broadcast_to(jnp.arange(8) >= shift, (3, 8)),
    )
    np.testing.assert_allclose(left.hidden_BTD[:, shift:], right.hidden_BTD[:, :length], atol=1e-5)


def test_program_does_not_grow_with_depth():
    """One set of parameters with a leading layer axis, one scanned body: 36 layers lower to the
    same number of operations as 4, forwards and backwards."""

    tokens_BT = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def operations(layers):
        model = random_model(layers=layers, lora=ADAPTERS, execution=Execution(remat="block"))
        graphdef, state = nnx.split(model)

        def loss(state, tokens_BT, key):
            model = nnx.merge(graphdef, state)
            out = run(
                model, tokens_BT, policy=jexit.Sample(), key=key, residual_layers=model.exit_layers
            )
            return out.hidden_BTD.sum() + out.hazard_logits_BTE.sum()

        lowered = jax.jit(jax.value_and_grad(loss)).lower(state, tokens_BT, key)
        return lowered.as_text().count("\n")

    small, large = operations(5), operations(36)
    assert small > 500 and large == small


@pytest.mark.parametrize("remat", ["none", "block"])
def test_heads_that_decide_nothing_take_memory_only_at_the_exits(remat):
    """Of their backward pass. In the scan over layers they would take it in every layer."""

    def temporaries(layers, hazards):
        model = random_model(layers=layers, width=64, execution=Execution(remat=remat))
        graphdef, state = nnx.split(model)

        def loss(state, tokens_BT):
            model, policy = nnx.merge(graphdef, state), jexit.Prescribed(tokens_BT % 5)
            out = run(model, tokens_BT, policy=policy, hazards=hazards)
            return out.hidden_BTD.sum() + (out.hazard_logits_BTE.sum() if hazards else 0.0)

        arguments = state, jax.ShapeDtypeStruct((4, 64), jnp.int32)
        compiled = jax.jit(jax.grad(loss)).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = (temporaries(n, True) - temporaries(n, False) for n in (6, 18))
    assert abs(many - few) < 0.2 * few


@pytest.mark.parametrize(
    "execution",
    [
        pytest.param({"remat": "dots"}, marks=pytest.mark.slow),
        # test_attention has this one beside another attention
        pytest.param({"remat": "block"}, marks=pytest.mark.slow),
        pytest.param({"scan_unroll": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_how_it_is_computed_does_not_change_loss_or_gradient(tokens_BT, depth_BT, execution):
    graphdef, state = nnx.split(random_model(lora=ADAPTERS))

    def gradient_of(**execution):
        loss = loss_of(graphdef, tokens_BT, depth_BT, Execution(**execution))
        lowered = jax.jit(jax.value_and_grad(loss)).lower(state)
        return lowered.as_text(), *lowered.compile()(state)

    program, plain, gradient = gradient_of()
    other, found, gradients = gradient_of(**execution)
    assert other != program  # the computations do differ
    assert float(found) == pytest.approx(float(plain), rel=1e-6)
    for one, truth in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradient), strict=True):
        assert relative_error(one, truth) <= 1e-4


def test_gradient_of_every_parameter_against_central_differences(tokens_BT, depth_BT):
    """Along one direction in each parameter, of what exits say too. Linear heads: a difference
    across relu's kink is not the slope on either side."""
    head = ExitSettings(kind="linear", continuation="linear", continuation_rank=3)
    graphdef, state = nnx.split(random_model(lora=ADAPTERS, exit_head=head))
    of_texts = loss_of(graphdef, tokens_BT, depth_BT)

    @jax.jit
    @jax.value_and_grad
    def value_and_gradient(state):
        model = nnx.merge(graphdef, state)
        residual_EBTD = run(model, tokens_BT, residual_layers=model.exit_layers).residual_RBTD
        said_EBTD = exit_hidden_states(model, residual_EBTD, model.blocks.continuation)
        return of_texts(state) + jnp.mean(jnp.tanh(said_EBTD[..., ::2]))

    gradient = value_and_gradient(state)[1]
    leaves, structure = jax.tree.flatten(state)
    found, truth = [], []
    for index, (leaf, slope) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):
        # Along the gradient itself the difference is largest against rounding.
        noise = np.random.default_rng(index).normal(size=leaf.shape)
        direction = slope / jnp.linalg.norm(slope) + 0.5 * noise / np.linalg.norm(noise)

        def at(step, index=index, direction=direction):
            moved = [*leaves]
            moved[index] = leaves[index] + step * direction
            return float(value_and_gradient(jax.tree.unflatten(structure, moved))[0])

        # Richardson's combination of two steps removes the cubic term.
        h = 1e-2
        wide, narrow = ((at(s) - at(-s)) / (2 * s) for s in (2 * h, h))
        truth.append((4 * narrow - wide) / 3)
        found.append(float(jnp.vdot(slope, direction)))
    found, truth = np.asarray(found), np.asarray(truth)
    assert len(found) > 20 and (np.abs(found) > 1e-4).all()
    # Each by itself: differences of a loss near 10 in float32 are known to about 1e-4.
    np.testing.assert_allclose(found, truth, rtol=GRADIENT, atol=5e-4)


def test_forward_takes_ragged_lengths_and_refuses_what_the_model_cannot_take(model):
    out = jexit.forward(model, np.asarray([[1, 2, 3, 4], [5, 6, 0, 0]]), [4, 2])
    alone = jexit.forward(model, np.asarray([[5, 6]]))
    np.testing.assert_allclose(out.logits_BTV[1, :2], alone.logits_BTV[0], atol=1e-5)
    for tokens, lengths, message in (
        ([[1, 31]], None, "tokens contain 31, but the model's tokens are 0 to 30"),
        ([[-1, 2]], None, "tokens contain -1"),
        ([1, 2], None, r"tokens have shape \(2,\)"),
        ([[]], None, r"tokens have shape \(1, 0\)"),
        (np.zeros((1, 129), int), None, "tokens have length 129, but the model has only 128"),
        ([[1, 2]], [3], "lengths contain 3, but the tokens have length 2"),
        ([[1, 2]], [0], "lengths contain 0"),
        ([[1, 2]], [1, 2], r"lengths have shape \(2,\), but they must have shape \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            jexit.forward(model, tokens, lengths)
