"""Model FLOPs against what XLA counts in the same passes, and `mfu` from them."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jexit.config import Execution, ExitSettings, LoRA
from jexit.dist import host_rows
from jexit.kernels.dispatch import compiling_for
from jexit.loops.flops import ModelFlops, PassSize, mfu
from jexit.model.policies import Prescribed
from jexit.model.transformer import Transformer, logits_of, run
from jexit.presets import PRESETS
from jexit.steps.state import split_model
from small_runs import ARCHITECTURE

# Wide enough that what is not a matrix product, which XLA counts too, is little.
ARCH = dataclasses.replace(
    ARCHITECTURE, vocab_size=640, width=256, query_heads=8, kv_heads=2, head_dim=48, mlp_width=704,
    tied=False,
)  # fmt: skip
ADAPTERS = LoRA(rank=16, alpha=16.0, targets=("q", "k", "o", "gate", "down"))
EXITS = (1, 2)
ROWS, LENGTH = 4, 32
# XLA computes every pair of a query and a key, and has no padding.
WHOLE = PassSize(ROWS * LENGTH, ROWS * LENGTH**2)
ELEMENTWISE = 0.04  # what XLA counts besides matrix products, at most


def make_model(lora, kind="mlp"):
    return Transformer(
        ARCH,
        exit_layers=EXITS,
        exit_head=ExitSettings(kind=kind),
        lora=lora,
        execution=Execution(attention="xla", scan_unroll=ARCH.layers),  # a loop counts once
        rngs=nnx.Rngs(0),
    )


def counted_by_xla(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


TOKENS_BT = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
DEPTHS_BT = jnp.full((ROWS, LENGTH), ARCH.layers)


@pytest.mark.parametrize(
    ("lora", "kind"), [pytest.param(None, "mlp", marks=pytest.mark.slow), (ADAPTERS, "linear")]
)
def test_a_forward_pass_is_what_xla_counts(lora, kind):
    model = make_model(lora, kind)
    graphdef, state = nnx.split(model)

    def forward(state, tokens_BT):
        model = nnx.merge(graphdef, state)
        out = run(model, tokens_BT, policy=Prescribed(DEPTHS_BT), hazards=True)
        return logits_of(out.hidden_BTD, model.head_VD), out.hazard_logits_BTE

    ours = ModelFlops.of(model, full=False)
    truth = ours.forward(WHOLE, hazards=True) + ours.logits(WHOLE.tokens)
    found = counted_by_xla(forward, state, TOKENS_BT)
    assert truth <= found <= (1 + ELEMENTWISE) * truth


@pytest.mark.parametrize(
    "full", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["lora", "full"]
)
def test_a_backward_pass_is_what_xla_counts(full):
    """Twice the forward pass for what trains, once for what is frozen."""
    model = make_model(None if full else ADAPTERS)
    split = split_model(model, full=full, keep_teacher=False)
    # With a gradient to the embedding none of the first layer's work can be left out.
    trainable, frozen = split.trainable, split.fixed.frozen

    def loss(trainable, frozen, offset_BTD, tokens_BT):
        model = nnx.merge(split.graphdef, trainable, frozen)
        out = run(model, tokens_BT, policy=Prescribed(DEPTHS_BT), hazards=True)
        logits = logits_of(out.hidden_BTD + offset_BTD, model.head_VD)
        return jnp.sum(jnp.square(logits)) + jnp.sum(out.hazard_logits_BTE)

    offset_BTD = jax.ShapeDtypeStruct((ROWS, LENGTH, ARCH.width), jnp.float32)
    found = counted_by_xla(jax.grad(loss, (0, 2)), trainable, frozen, offset_BTD, TOKENS_BT)
    ours = ModelFlops.of(model, full=full)
    passes = ours.forward(WHOLE, hazards=True) + ours.backward(WHOLE, hazards=True)
    truth = passes + ours.logits(WHOLE.tokens, trained=True)
    assert found == pytest.approx(truth, rel=ELEMENTWISE)


def test_a_token_and_a_pair_of_tokens_are_counted_once():
    size = PassSize.of(np.asarray([5, 3]))
    assert size == (8, 15 + 6)
    # Two completions of 3 and 1 after one prompt of 2, and one of 2 after one of 1.
    branched = PassSize.of_branches([2, 2, 1], [3, 1, 2], np.array([True, False, True]))
    assert branched == (3 + 6, (3 + 1) + (2 * 3 + 6) + (2 * 1 + 1) + (1 * 2 + 3))


def test_the_biggest_part_is_six_times_the_parameters_a_token():
    """The rule of thumb, for a real model without adapters, within a twentieth."""
    arch = PRESETS["qwen3-4b"].architecture
    head = ExitSettings()
    ours = ModelFlops(arch=arch, exit_layers=(), exit_head=head, lora=None, full=True)
    parameters = 4.02e9  # published; the tied head is among them
    found = ours.pretrain_step(PassSize.of(np.array([512])), exit_loss=False) / 512
    assert found == pytest.approx(6 * parameters, rel=0.05)


def rollouts(depths, prompt=3):
    """What counts of rollouts."""
    depths_BT = np.asarray(depths)
    return types.SimpleNamespace(
        lengths_B=(depths_BT > 0).sum(1),
        depths_BT=depths_BT,
        prompt_lengths_B=np.full(len(depths_BT), prompt),
        host_rows=host_rows(len(depths_BT)),
    )


def test_rollouts_cost_what_ran():
    """At full depth what one pass over the row costs; at depth 1 two layers' keys and values."""
    ours = ModelFlops.of(make_model(None), full=False)
    everyone = np.ones(2, bool)
    whole = ours.rollouts(rollouts([[3, 3, 3, 0], [3, 0, 0, 0]]), everyone, samples=2)
    prompt, row = PassSize.of([3]), PassSize.of([5])
    heads = 2 * (4 * ARCH.width**2 + 4 * ARCH.width)
    truth = ours.forward(row) + 2 * heads + ours.logits(1 + 2)
    assert whole == pytest.approx(truth)
    early = ours.rollouts(rollouts([[3, 1, 1, 0], [3, 0, 0, 0]]), everyone, samples=2)
    saved = ours.forward(row) - ours.forward(prompt)
    kept = 2 * 2 * ARCH.width * ARCH.kv_heads * ARCH.head_dim  # a token's keys and values
    assert whole - early == pytest.approx(saved * 2 / 3 - 2 * kept * 2 + 2 * heads / 2)
    halves = [
        ours.rollouts(rollouts([[3, 2, 1, 3], [3, 3, 0, 0]]), np.asarray(rows), samples=2)
        for rows in ([True, False], [False, True], [True, True])
    ]
    assert halves[0] + halves[1] == pytest.approx(halves[2])


def test_mfu_is_a_share_of_the_chips_peak():
    with compiling_for("tpu", "TPU v5 lite"):
        assert mfu(197e12, 2.0, 4) == {"mfu": pytest.approx(1 / 8)}
    with compiling_for("gpu", "NVIDIA H100 80GB HBM3"):
        assert mfu(989.4e12, 1.0, 1) == {"mfu": pytest.approx(1.0)}
    with compiling_for("gpu", "NVIDIA GeForce RTX 5090"):
        assert mfu(1e12, 1.0, 1) == {}
    assert mfu(1e12, 1.0, 1) == {}
