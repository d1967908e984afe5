"""Model FLOPs against what XLA counts in the same passes, and `mfu` from them."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jexit.config import Execution, ExitSettings, LoRA, OptimConfig
from jexit.dist import host_rows
from jexit.kernels.dispatch import compiling_for
from jexit.loops.flops import ModelFlops, PassSize, mfu
from jexit.model.policies import Prescribed
from jexit.model.transformer import Transformer, logits_of, run
from jexit.presets import PRESETS
from jexit.results import PolicyResult
from jexit.steps.optim import split_for_training
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


def make_model(lora, kind="mlp", continuation="frozen"):
    return Transformer(
        ARCH,
        exit_layers=EXITS,
        exit_head=ExitSettings(kind=kind, continuation=continuation),
        lora=lora,
        execution=Execution(attention="xla", scan_unroll=ARCH.layers),  # a loop counts once
        rngs=nnx.Rngs(0),
    )


def counted_by_xla(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


TOKENS_BT = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
DEPTHS_BT = jnp.full((ROWS, LENGTH), ARCH.layers)


@pytest.mark.parametrize(
    ("lora", "kind", "continuation"),
    [
        pytest.param(None, "mlp", "frozen", marks=pytest.mark.slow),
        (ADAPTERS, "linear", "frozen"),
        (ADAPTERS, "linear", "linear"),
    ],
)
def test_a_forward_pass_is_what_xla_counts(lora, kind, continuation):
    model = make_model(lora, kind, continuation)
    graphdef, state = nnx.split(model)

    def forward(state, tokens_BT):
        model = nnx.merge(graphdef, state)
        out = run(model, tokens_BT, policy=Prescribed(DEPTHS_BT), hazards=True)
        return logits_of(out.hidden_BTD, model.head_VD), out.hazard_logits_BTE

    ours = ModelFlops.of(model, full=False)
    truth = ours.forward(WHOLE, exits=True) + ours.logits(WHOLE.tokens)
    found = counted_by_xla(forward, state, TOKENS_BT)
    assert truth <= found <= (1 + ELEMENTWISE) * truth


@pytest.mark.parametrize(
    ("full", "continuation"),
    [(False, "frozen"), (False, "linear"), pytest.param(True, "frozen", marks=pytest.mark.slow)],
)
def test_a_backward_pass_is_what_xla_counts(full, continuation):
    """Twice the forward pass for what trains, once for what is frozen."""
    model = make_model(None if full else ADAPTERS, continuation=continuation)
    split, _ = split_for_training(model, OptimConfig(), full=full, keep_teacher=False)
    # With a gradient to the embedding none of the first layer's work can be left out.
    trainable, frozen = split.trainable, split.fixed.frozen

    def loss(trainable, frozen, offset_BTD, tokens_BT):
        model = nnx.merge(split.graphdef, trainable, frozen)
        out = run(model, tokens_BT, policy=Prescribed(DEPTHS_BT), hazards=True)
        logits = logits_of(out.hidden_BTD + offset_BTD, model.head_VD)
        return jnp.sum(jnp.square(logits)) + jnp.sum(out.hazard_logits_BTE)

    offset_BTD = jax.ShapeDtypeStruct((ROWS, LENGTH, ARCH.width), jnp.float32)

    def gradients(trainable, frozen, offset_BTD, tokens_BT):
        def of_both(both, *others):
            return loss(both[0], others[0], both[1], others[1]), None

        trains = (split.trains, True)
        both = split._replace(trains=trains).value_and_grad(of_both)
        return both((trainable, offset_BTD), frozen, tokens_BT)

    found = counted_by_xla(gradients, trainable, frozen, offset_BTD, TOKENS_BT)
    ours = ModelFlops.of(model, full=full)
    passes = ours.forward(WHOLE, exits=True) + ours.backward(WHOLE, exits=True)
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


def kept_of(policy):
    """Four tokens leave at exit 1, one at exit 2; three run all layers, two of them are first."""
    mean = (4 * 1 + 1 * 2 + 3 * 3) / 8
    return PolicyResult(
        policy=policy, accuracy=1.0, accuracy_ci95=(0.5, 1.0), depth_mean=mean,
        depth_fraction=mean / 3, depth_histogram={"1": 4, "2": 1, "3": 3}, problems=2, tokens=8,
        tokens_per_second=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("rank", [0, 5])
def test_compute_that_is_left_is_the_sum_of_its_parts(rank):
    head = ExitSettings(continuation="linear", continuation_rank=rank)
    ours = ModelFlops(arch=ARCH, exit_layers=EXITS, exit_head=head, lora=ADAPTERS, full=False)
    width, keys, queries = 256, 2 * 48, 8 * 48
    # Adapters are on q, k, o, gate and down.
    adapters = 2 * 16 * ((width + queries) * 2 + (width + keys) + (width + 704) * 2)
    layer = 2 * width * (2 * queries + 2 * keys + 3 * 704) + adapters
    maps = 2 * 2 * width * rank if rank else 2 * width * width
    skipped = 2 * width * 2 * keys + 2 * 16 * (width + keys) + maps
    assert ours.skipped_layer() == skipped
    layers = (15 * layer + (24 - 15) * skipped) / (24 * layer)
    read = 4 * 1 + 1 * 2 + (3 - 2) * 2  # exits of the tokens that are not first
    for policy, decision in (
        ("full", 0), ("fixed:1", 0), ("shuffled", 0), ("sample", 4 * width**2 + 4 * width),
        ("threshold:0.5", 4 * width**2 + 4 * width), ("confidence:0.9", 2 * width * 640),
    ):  # fmt: skip
        found = ours.compute_fraction(kept_of(policy))
        assert found == pytest.approx(layers + read * decision / (24 * layer)), policy


def test_a_step_is_the_sum_of_its_passes():
    """Three completions of 4, 2 and 3 tokens after prompts of 5, 5 (one, shared) and 6."""
    head = ExitSettings(kind="linear", continuation="linear")
    ours = ModelFlops(arch=ARCH, exit_layers=EXITS, exit_head=head, lora=ADAPTERS, full=False)
    width, keys, queries, new = 256, 2 * 48, 8 * 48, 9
    size = PassSize.of_branches([5, 5, 6], [4, 2, 3], np.array([True, False, True]))
    tokens, pairs = 5 + 6 + new, 15 + 21 + (20 + 10) + (10 + 3) + (18 + 6)
    assert size == (tokens, pairs)
    base = 2 * width * (2 * queries + 2 * keys + 3 * 704)
    adapters = 2 * 16 * ((width + queries) * 2 + (width + keys) + (width + 704) * 2)
    pair, logit = 4 * queries, 2 * width * 640
    heads, maps = 2 * 2 * width, 3 * 2 * width**2
    plain = 3 * (base * tokens + pair * pairs)
    adapted = plain + 3 * adapters * tokens
    backward = 3 * ((base + 2 * adapters) * tokens + 2 * pair * pairs)
    # Heads train, the continuation and the output head do not.
    student = adapted + backward + (3 * heads + 2 * maps) * tokens + 2 * logit * new
    assert ours.rl_step(size, new, updates=2) == plain + logit * new + 2 * student
    measured = plain + 3 * logit * new + 2 * 2 * width**2 * new
    assert ours.sft_step(size, new, samples=4, target="teacher") == measured + 4 * student
    assert ours.sft_step(size, new, samples=4, target="own") == measured + adapted + 4 * student
    assert ours.lens_step(7) == 3 * heads * 7
    assert ours.finetune_step(size, new) == adapted + backward + 2 * logit * new
    full = dataclasses.replace(ours, lora=None, full=True)
    backward = 3 * (2 * base * tokens + 2 * pair * pairs)
    assert full.finetune_step(size, new) == plain + backward + 3 * logit * new


def test_mfu_is_a_share_of_the_chips_peak():
    with compiling_for("tpu", "TPU v5 lite"):
        assert mfu(197e12, 2.0, 4) == {"mfu": pytest.approx(1 / 8)}
    with compiling_for("gpu", "NVIDIA H100 80GB HBM3"):
        assert mfu(989.4e12, 1.0, 1) == {"mfu": pytest.approx(1.0)}
    with compiling_for("gpu", "NVIDIA GeForce RTX 5090"):
        assert mfu(1e12, 1.0, 1) == {}
    assert mfu(1e12, 1.0, 1) == {}
