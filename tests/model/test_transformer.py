"""The stack: what `run` returns, how its program grows, and its gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jexit
from jexit.config import Execution, ExitSettings, LoRA
from jexit.model.exits import depth_log_prob
from jexit.model.transformer import Transformer, exit_hidden_states, logits_of, run
from jexit.presets import PRESETS
from tolerances import GRADIENT, relative_error

EXITS, LAYERS = (1, 2, 4), 5


@pytest.fixture(scope="module")
def tokens_BT():
    return jnp.asarray(np.random.default_rng(0).integers(0, 31, (3, 8)))


@pytest.fixture(scope="module")
def depth_BT():
    return jnp.asarray(np.random.default_rng(1).choice([1, 2, 4, 5], (3, 8)))


@pytest.fixture(scope="module")
def adapted(make_model):
    return make_model(lora=LoRA(rank=2, alpha=4.0, targets=("q", "k", "down")))


run_jit = nnx.jit(run, static_argnames=("hazards", "exit_residual", "keys_values"))


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


def test_returns_what_was_asked_for_and_nothing_else(model, tokens_BT):
    bare = run_jit(model, tokens_BT)
    assert bare.hazard_logits_BTE is bare.exit_residual_EBTD is bare.keys_values is None
    assert bare.hidden_BTD.shape == (3, 8, 16) and bare.depth_BT.shape == (3, 8)
    rich = run_jit(model, tokens_BT, hazards=True, exit_residual=True, keys_values=True)
    assert rich.hazard_logits_BTE.shape == (3, 8, 3)
    assert rich.exit_residual_EBTD.shape == (3, 3, 8, 16)
    assert rich.keys_values.keys.shape == rich.keys_values.values.shape == (5, 3, 8, 2, 6)
    np.testing.assert_allclose(rich.hidden_BTD, bare.hidden_BTD, atol=1e-6)


def test_exit_residuals_are_the_outputs_of_stopping_there(model, tokens_BT):
    """With everybody at full depth, exit ℓ's residual is what ℓ layers alone end with."""
    residual_EBTD = run_jit(model, tokens_BT, exit_residual=True).exit_residual_EBTD
    lens_EBTD = exit_hidden_states(model, residual_EBTD, None)
    for index, exit_layer in enumerate(EXITS):
        stopped = run_jit(model, tokens_BT, policy=jexit.Prescribed(jnp.full((3, 8), exit_layer)))
        np.testing.assert_allclose(lens_EBTD[index], stopped.hidden_BTD, atol=1e-5)


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


def test_later_tokens_never_reach_back(model, tokens_BT, depth_BT):
    policy = jexit.Prescribed(depth_BT)
    before = jexit.forward(model, tokens_BT, policy=policy)
    changed_BT = tokens_BT.at[:, 5:].set((tokens_BT[:, 5:] + 1) % 31)
    after = jexit.forward(model, changed_BT, policy=policy)
    np.testing.assert_allclose(
        after.logits_BTV[:, :5], before.logits_BTV[:, :5], atol=1e-6, rtol=1e-6
    )
    assert np.abs(after.logits_BTV[:, 5:] - before.logits_BTV[:, 5:]).max() > 0.1


def test_a_frozen_token_still_speaks_to_later_tokens(model, tokens_BT):
    """Its keys and values at later layers come from its frozen residual, so its depth matters."""
    depth_BT = np.full((3, 8), LAYERS)
    full = jexit.forward(model, tokens_BT, policy=jexit.Prescribed(depth_BT))
    depth_BT[:, 3] = 2
    frozen = jexit.forward(model, tokens_BT, policy=jexit.Prescribed(depth_BT))
    changed_BT = np.abs(frozen.logits_BTV - full.logits_BTV).max(-1) > 1e-3
    assert not changed_BT[:, :3].any() and changed_BT[:, 3:].all()


def test_program_does_not_grow_with_depth():
    """One set of parameters with a leading layer axis, one scanned body: 36 layers lower to the
    same number of operations as 4, forwards and backwards."""

    def operations(layers, remat):
        arch = PRESETS["qwen3-0.6b"].architecture
        arch = dataclasses.replace(arch, layers=layers)

        def build():
            return Transformer(
                arch,
                exit_layers=(1, 2),
                lora=LoRA(rank=2, alpha=2.0),
                execution=Execution(remat=remat),
                rngs=nnx.Rngs(0),
            )

        graphdef, state = nnx.split(nnx.eval_shape(build))
        tokens_BT = jax.ShapeDtypeStruct((2, 8), jnp.int32)

        def loss(state, tokens_BT, key):
            model = nnx.merge(graphdef, state)
            out = run(model, tokens_BT, policy=jexit.Sample(), key=key, exit_residual=True)
            return out.hidden_BTD.sum() + out.hazard_logits_BTE.sum()

        def step(state, tokens_BT, key):
            return jax.value_and_grad(loss)(state, tokens_BT, key)

        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.jit(step).lower(state, tokens_BT, key).as_text().count("\n")

    for remat in ("none", "block"):
        small, large = operations(4, remat), operations(36, remat)
        assert small > 500 and large == small


def test_how_it_is_computed_does_not_change_loss_or_gradient(adapted, tokens_BT, depth_BT):
    for execution in [Execution(remat="block"), Execution(remat="dots"), Execution(scan_unroll=2)]:
        graphdef, state = nnx.split(adapted)
        plain, gradient = jax.jit(jax.value_and_grad(loss_of(graphdef, tokens_BT, depth_BT)))(state)
        other = loss_of(graphdef, tokens_BT, depth_BT, execution)
        found, gradients = jax.jit(jax.value_and_grad(other))(state)
        assert float(found) == pytest.approx(float(plain), rel=1e-6)
        for found, truth in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradient), strict=True):
            assert relative_error(found, truth) <= 1e-4


def test_rematerialising_changes_the_program(adapted, tokens_BT, depth_BT):
    """So that the test above compares different computations."""
    graphdef, state = nnx.split(adapted)
    programs = {
        remat: str(
            jax.make_jaxpr(
                jax.grad(loss_of(graphdef, tokens_BT, depth_BT, Execution(remat=remat)))
            )(state)
        )
        for remat in ("none", "block", "dots")
    }
    assert len(set(programs.values())) == 3


def test_gradient_of_every_parameter_against_central_differences(make_model, tokens_BT, depth_BT):
    """Along one direction in each parameter. Linear heads: a difference across relu's kink is not
    the slope on either side."""
    lora = LoRA(rank=2, alpha=4.0, targets=("q", "k", "down"))
    model = make_model(lora=lora, exit_head=ExitSettings(kind="linear"))
    graphdef, state = nnx.split(model)
    loss = jax.jit(loss_of(graphdef, tokens_BT, depth_BT))
    gradient = jax.jit(jax.grad(loss_of(graphdef, tokens_BT, depth_BT)))(state)
    leaves, structure = jax.tree.flatten(state)
    found, truth = [], []
    for index, (leaf, slope) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):
        # Along the gradient itself the difference is largest against rounding.
        direction = slope / jnp.linalg.norm(slope)
        noise = jax.random.normal(jax.random.key(index), leaf.shape)
        direction += 0.5 * noise / jnp.linalg.norm(noise)

        def at(step, index=index, direction=direction):
            moved = [*leaves]
            moved[index] = leaves[index] + step * direction
            return float(loss(jax.tree.unflatten(structure, moved)))

        # Richardson's combination of two steps removes the cubic term.
        h = 1e-2
        wide, narrow = ((at(s) - at(-s)) / (2 * s) for s in (2 * h, h))
        truth.append((4 * narrow - wide) / 3)
        found.append(float(jnp.vdot(slope, direction)))
    found, truth = np.asarray(found), np.asarray(truth)
    assert len(found) > 20 and (np.abs(found) > 1e-4).all()
    # Each by itself: differences of a loss near 10 in float32 are known to about 1e-4.
    np.testing.assert_allclose(found, truth, rtol=GRADIENT, atol=5e-4)


def test_frozen_layers_get_no_gradient_from_a_tokens_own_update(model):
    """A lone token at depth 2 uses layers 0 and 1 only, so no other layer has a gradient."""
    graphdef, state = nnx.split(model)

    @jax.jit
    @jax.grad
    def gradient_of(state):
        model = nnx.merge(graphdef, state)
        policy = jexit.Prescribed(jnp.full((1, 1), 2))
        return run(model, jnp.asarray([[7]]), policy=policy).hidden_BTD.sum()

    gradient = gradient_of(state)
    kernel_LFD = gradient["blocks"]["mlp"]["down"]["kernel"][...]
    used_L = np.abs(kernel_LFD).max((1, 2)) > 0
    np.testing.assert_array_equal(used_L, [True, True, False, False, False])


def test_forward_takes_plain_lists_and_ragged_lengths(model):
    tokens_BT = [[1, 2, 3, 4], [5, 6, 0, 0]]
    out = jexit.forward(model, np.asarray(tokens_BT), [4, 2])
    alone = jexit.forward(model, np.asarray([[5, 6]]))
    np.testing.assert_allclose(out.logits_BTV[1, :2], alone.logits_BTV[0], atol=1e-5)


REFUSED = [
    ([[1, 31]], None, "tokens hold 31 and the model's vocabulary has 31"),
    ([[-1, 2]], None, "tokens hold -1"),
    ([1, 2], None, r"tokens have shape \(2,\)"),
    ([[]], None, r"tokens have shape \(1, 0\)"),
    (np.zeros((1, 129), int), None, "tokens are 129 long and the model takes 128"),
    ([[1, 2]], [3], "lengths hold 3 for tokens of length 2"),
    ([[1, 2]], [0], "lengths hold 0"),
    ([[1, 2]], [1, 2], r"lengths have shape \(2,\) for 1 sequences"),
]


def test_forward_refuses_what_the_model_cannot_take(model):
    for tokens, lengths, message in REFUSED:
        with pytest.raises(ValueError, match=message):
            jexit.forward(model, tokens, lengths)
