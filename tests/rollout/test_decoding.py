"""The engine against teacher forcing, Hugging Face, and itself in other sizes."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import jexit
from jexit.dist import make_mesh
from jexit.model import cache
from jexit.model.policies import Full, Prescribed, Sample, Threshold
from jexit.model.transformer import forward
from jexit.rollout import (
    Decoding,
    EngineSize,
    Request,
    Rollouts,
    engine,
    prefill,
    rollout,
    scheduling,
    ticks,
    weights,
)
from jexit.rollout.prefill import prefill as prefill_program
from teacher_forcing import assert_as_teacher_forced
from tolerances import LOGPROBS

LAYERS, DEPTHS, PAD, COLUMNS = 5, (1, 2, 4, 5), 59, 14
SMALL = EngineSize(rows=7, tick_rows=3)
DEPTH_BT = np.random.default_rng(1).choice(DEPTHS, (20, COLUMNS))
SAMPLE = Sample(temperature=2.0, min_hazard=0.1)
ASKED = {
    "max_new_tokens": COLUMNS,
    "eos_ids": (60, 7, 12),
    "pad_id": PAD,
    "key": 4,
    "temperature": 0.9,
    "top_p": 0.95,
    "samples_per_prompt": 2,
    "hazards": True,
}
GREEDY = {"max_new_tokens": 12, "eos_ids": (), "pad_id": PAD, "key": 0, "temperature": 0.0}


def ten_prompts() -> list[list[int]]:
    rng = np.random.default_rng(8)
    return [rng.integers(0, 60, length).tolist() for length in (3, 11, 6, 14, 1, 12, 2, 16, 9, 5)]


def decoded(model, prompts, *, size=SMALL, **asked) -> Rollouts:
    """Completions that are what teacher forcing says."""
    made = rollout(model, prompts, size=size, **asked)
    assert_as_teacher_forced(model, Request(prompts=prompts, **asked), made)
    return made


def assert_same(made: Rollouts, other: Rollouts) -> None:
    for name in ("lengths_B", "tokens_BT", "depths_BT"):
        np.testing.assert_array_equal(getattr(made, name), getattr(other, name), name)
    for name in ("logprobs_BT", "depth_logprobs_BT", "hazard_logits_BTE"):
        found, wanted = getattr(made, name), getattr(other, name)
        np.testing.assert_allclose(found, wanted, 0, LOGPROBS, err_msg=name)


@pytest.fixture(scope="module")
def sampled(model) -> Rollouts:
    """Twenty completions of ten prompts in a pool of seven rows."""
    return decoded(model, ten_prompts(), policy=SAMPLE, **ASKED)


def test_every_policy_decodes_as_teacher_forcing_says(model, sampled):
    assert len(set(sampled.lengths_B.tolist())) > 4, "completions should end at different times"
    assert 1 in sampled.lengths_B and sampled.truncated_B.any()
    assert len(np.unique(sampled.depths_BT)) > 4
    # Prescribed depths are tried at random below.
    teacher = {"temperature": 0.0, "top_p": 1.0, "first_prompt": 3, "adapters": False}
    for policy, asked in ((Full(), {}), (Threshold(0.55), {}), (SAMPLE, teacher)):
        made = decoded(model, ten_prompts(), policy=policy, **ASKED | asked)
        seen = set(made.depths_BT.flat) - {0}
        assert seen == {LAYERS} if isinstance(policy, Full) else len(seen) > 2


def test_sizes_and_stacked_weights_change_nothing(model, sampled, monkeypatch):
    """A row for each completion, one row for all; weights as accelerators have them."""
    asked = ASKED | {"policy": SAMPLE}
    one = EngineSize(rows=1, tick_rows=1)
    assert_same(rollout(model, ten_prompts(), size=one, **asked), sampled)
    monkeypatch.setattr(engine, "on_cpu", lambda: False)
    all_at_once = EngineSize(rows=20, tick_rows=20)
    assert_same(rollout(model, ten_prompts(), size=all_at_once, **asked), sampled)


# One shape of everything, so that the examples share two programs.
@settings(max_examples=10)
@given(data=st.data())
def test_any_depths_and_ends(model, data):
    """Depths, prompts and end tokens at random: every token still comes out as it should."""
    lengths = data.draw(st.lists(st.integers(1, 16), min_size=8, max_size=8))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    prompts = [rng.integers(0, 60, length).tolist() for length in lengths]
    deepest = data.draw(st.integers(1, len(DEPTHS)))
    policy = Prescribed(rng.choice(DEPTHS[:deepest], (8, COLUMNS)))
    ends = data.draw(st.lists(st.integers(0, 60), min_size=3, max_size=3))
    # A draw at random may fall within rounding of the border between two tokens.
    asked = GREEDY | {"policy": policy, "max_new_tokens": COLUMNS, "eos_ids": ends}
    decoded(model, prompts, size=EngineSize(rows=5, tick_rows=2), **asked)


@pytest.mark.slow
def test_a_small_prefix_cache_and_caches_that_grow(model, monkeypatch):
    """Prompts are prefilled as others have begun, into their slots; rows outgrow their caches."""
    monkeypatch.setitem(scheduling.PREFILL_TOKENS, "cpu", 64)  # groups of 4, of 2 and of 1
    monkeypatch.setattr(cache, "SMALLEST_CACHE", 16)
    asked = ASKED | {"policy": SAMPLE, "hazards": False, "max_new_tokens": 40}
    made = decoded(model, 2 * ten_prompts(), size=EngineSize(rows=5, tick_rows=2), **asked)
    assert made.shape == (16, 64) and made.lengths_B.max() > 20


def test_finished_rows_make_room_at_once(model):
    """Completions of many lengths over two rows: each takes the row that is free first."""
    prompts = [[5, token] for token in range(24)]
    asked = {"max_new_tokens": 40, "eos_ids": (60, 7, 12, 33), "pad_id": PAD, "key": 0}
    request = Request(prompts=prompts, **asked)
    decoding = Decoding(model, request, EngineSize(rows=2, tick_rows=2))
    while not decoding.turn():
        pass
    made = decoding.rollouts()
    assert made.lengths_B.min() < 4 and made.lengths_B.max() > 20
    busy = [0, 0]
    for length in made.lengths_B.tolist():
        # A tick a token, of which the prefill drew one; at least the tick that takes the row.
        busy[busy.index(min(busy))] += max(length - 1, 1)
    # And one for the last token of all, which nobody's next pass goes with.
    assert decoding.engine.pool.tick.tolist() == [max(busy) + 1]


@pytest.mark.parametrize(
    ("family", "tied", "seed", "gain"),
    [
        ("qwen3", True, 2, 6.0),
        pytest.param("qwen2", False, 9, 1.0, marks=pytest.mark.slow),
        pytest.param("llama", False, 8, 1.0, marks=pytest.mark.slow),
    ],
)
def test_greedy_equals_hugging_face(tmp_path, family, tied, seed, gain):
    """Prompts of several lengths in one batch against each alone there, end token included."""
    torch = pytest.importorskip("torch")
    import hf_models

    theirs = hf_models.make_model(family, seed=seed, tie_word_embeddings=tied)
    for name, parameter in theirs.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.data.mul_(gain)  # otherwise a tied head repeats the token that came in
    ours, tokenizer = jexit.load(hf_models.save(tmp_path, theirs), exit_layers=(2,))
    rng = np.random.default_rng(3)
    prompts = [rng.integers(4, 60, length).tolist() for length in (3, 17, 1, 30)]

    @torch.inference_mode()
    def greedy(prompt, eos_ids):
        out = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=60,
            do_sample=False,
            eos_token_id=sorted(eos_ids),
            pad_token_id=tokenizer.pad_id,
        )
        return out[0, len(prompt) :].tolist()

    eos_ids = tokenizer.eos_ids | {greedy(prompts[1], tokenizer.eos_ids)[25]}
    expected = [greedy(prompt, eos_ids) for prompt in prompts]
    assert len(expected[1]) <= 26
    assert max(map(len, expected)) == 60
    assert max(len(set(tokens)) for tokens in expected) >= 10, "they should not just repeat"
    asked = GREEDY | {"max_new_tokens": 60, "eos_ids": eos_ids, "pad_id": tokenizer.pad_id}
    found = rollout(ours, prompts, **asked)
    assert [found.completion(row) for row in range(len(prompts))] == expected


def test_prompts_are_prefilled_once_and_with_those_of_like_length(model, monkeypatch):
    shapes, whole = [], prefill.run

    def seen(model, tokens_BT, **asked):
        shapes.append(tokens_BT.shape)
        return whole(model, tokens_BT, **asked)

    monkeypatch.setattr(prefill, "run", seen)
    prompts = [[5] * length for length in (3, 11, 6)]
    made = rollout(model, prompts, samples_per_prompt=7, **GREEDY | {"max_new_tokens": 1})
    assert made.rows == 21 and shapes == [(3, 16)]
    assert made.prompt_padding == pytest.approx(1 - 20 / 48)

    shapes.clear()
    monkeypatch.setitem(scheduling.PREFILL_TOKENS, "cpu", 128)  # two prompts of up to 64 tokens
    lengths = [60, 3, 17, 64, 5, 20]
    prompts = [[length % 60] * length for length in lengths]
    made = rollout(model, prompts, **GREEDY | {"max_new_tokens": 1})
    assert shapes == [(2, 16), (2, 32), (2, 64)]
    assert made.prompt_padding == pytest.approx(1 - sum(lengths) / 224)


def test_programs_multiply_with_neither_prompt_lengths_nor_parameters(model, prompts):
    """One prefill a prompt bucket, and ticks for each size of the cache and of the prompts."""

    def programs():
        return np.asarray([prefill_program._cache_size(), ticks.advance._cache_size()])

    before, counts = programs(), []
    for length in (1, 16, 17):
        rollout(model, [[3] * length], **GREEDY | {"max_new_tokens": 41})
        counts.append((programs() - before).tolist())
    assert counts == [[1, 1], [1, 1], [2, 2]]  # prompts in 16 and 32 slots; caches of 128

    graphdef, trained, rest = nnx.split(model, nnx.filterlib.OfType(type(model.exits.b2)), ...)
    early = rollout((graphdef, trained, rest), prompts, policy=Sample(), **GREEDY)
    compiled = programs()
    moved = jax.tree.map(lambda x: x - 100.0, trained)
    late = rollout((graphdef, moved, rest), prompts, policy=Sample(0.5, 0.0), **GREEDY | {"key": 4})
    assert (programs() == compiled).all()
    assert (early.depths_BT < LAYERS).any()
    assert (late.depths_BT == LAYERS).all(), "hazards near nothing"


def equations(jaxpr):
    """Those of a jaxpr and of all that are inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from equations(getattr(value, "jaxpr", value))


def is_jaxpr(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


@pytest.mark.parametrize(("count", "samples"), [(3, 4), (1, 1)])
def test_ticks_copy_neither_cache_nor_weights(model, prompts, monkeypatch, count, samples):
    """Temporaries of a layer's keys and values at a time, and no scan over stacked weights.

    What a scan is given to slice is copied whether or not a branch reads it. With a single row, the
    compiler is free to order the cache's axes in another way in one of the loops.
    """
    traced, whole = [], ticks.advance

    def trace(graphdef, states, layers, pool, *asked, **static):
        larger = dataclasses.replace(pool, cache=engine.pool.grown(pool.cache, slots=1024))
        traced.append(whole.trace(graphdef, states, layers, larger, *asked, **static))
        return whole(graphdef, states, layers, pool, *asked, **static)

    trace._cache_size = whole._cache_size
    monkeypatch.setattr(ticks, "advance", trace)
    prompts = prompts[:count]
    rollout(model, prompts, samples_per_prompt=samples, policy=Sample(), hazards=True, **GREEDY)
    program = traced[0]
    slots = count * samples * 1024
    cache_bytes = LAYERS * slots * model.arch.kv_heads * model.arch.head_dim * 4  # keys alone
    assert program.lower().compile().memory_analysis().temp_size_in_bytes < cache_bytes
    names = [equation.primitive.name for equation in equations(program.jaxpr.jaxpr)]
    assert names.count("while") >= 4, "over ticks, layers, layers to fill, prompts to copy"
    scanned = [
        sliced.aval.shape
        for equation in equations(program.jaxpr.jaxpr)
        if equation.primitive.name == "scan"
        for sliced in equation.invars[equation.params["num_consts"] :]
    ]
    assert not [shape for shape in scanned if len(shape) > 1 and shape[0] == LAYERS]


def test_a_tick_runs_the_layers_that_its_rows_need(model, prompts, monkeypatch):
    """The layer loop's own count: a row that has ended keeps nobody running."""
    depth_BT = np.full((3, 12), 1)
    asked = GREEDY | {"policy": Prescribed(depth_BT), "max_new_tokens": 11}
    tokens_BT = np.asarray(rollout(model, prompts, **asked).tokens_BT)
    # A row whose first token, drawn at full depth, no other row ever says.
    row = next(r for r in range(3) if tokens_BT[r, 0] not in np.delete(tokens_BT, r, axis=0))
    depth_BT[row] = LAYERS
    ran, whole = [], ticks.at_layer

    def counted(layer, blocks, apart, function, *operands):
        if function.__name__ != "output":  # the second half of what began with "inputs"
            jax.debug.callback(lambda layer: ran.append(int(layer)), layer)
        return whole(layer, blocks, apart, function, *operands)

    monkeypatch.setattr(ticks, "at_layer", counted)
    # Records of 16 columns, as nowhere else: the ticks are traced anew, and no other test meets the
    # callback.
    monkeypatch.setattr(scheduling, "LEAST_COLUMNS", 16)
    made = rollout(model, prompts, **asked | {"eos_ids": [int(tokens_BT[row, 0])]})
    jax.effects_barrier()
    assert made.lengths_B.tolist() == [1 if r == row else 11 for r in range(3)]
    # Ten passes of one layer each, and the other four skipped in every one of them.
    assert ran.count(0) == 10
    assert [ran.count(layer) for layer in range(1, LAYERS)] == [10] * 4


def test_wrong_requests_get_one_sentence(model, prompts):
    for wrong, asked, sentence in [
        ([], {}, "prompts is empty, but a request"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 512], {}, "prompt 0 has 512 tokens, but the model has 512 positions"),
        ([[1] * 505], {}, "lower max_new_tokens to at most 7"),
        ([[61]], {}, "token 61"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"max_new_tokens": 3.0}, r"max_new_tokens is 3\.0, but it must be a whole number"),
        ([[1]], {"samples_per_prompt": 0}, "samples_per_prompt is 0"),
        ([[1]], {"top_k": 2.5}, r"top_k is 2\.5, but it must be a whole number of at least 0 "),
        ([[1]], {"policy": Prescribed(np.ones((2, 12)))}, r"\(2, 12\), .* shape \(1, N\)"),
        ([[1]], {"policy": Prescribed(np.ones((1, 11)))}, r"\(1, 11\), but .* N of at least 12"),
        ([[1]], {"policy": Prescribed(np.ones(12))}, r"\(12,\), but .* or use Fixed\(depth\)"),
        ([[1]], {"policy": Prescribed(np.full((1, 12), 3))}, r"depth 3, .* exits \(1, 2, 4\)"),
        ([[1]], {"forced": [0, 1]}, "forced has 2 entries, but prompts has 1"),
        ([[1, 2]], {"forced": [2]}, r"forced\[0\] is 2, but prompt 0 has 2 tokens"),
        ([[1, 2]], {"forced": [-1]}, "a number from 0 to 1"),
        ([[1, 2]], {"forced": [1], "policy": Prescribed(np.ones((1, 12)))}, "of at least 13"),
        (
            [[1, 2]],
            {"forced": [1], "policy": Prescribed(np.ones((2, 13))), "samples_per_prompt": 2},
            "samples_per_prompt is 2, but the samples of a prompt share one prefill",
        ),
    ]:
        with pytest.raises(ValueError, match=sentence) as error:
            rollout(model, wrong, **GREEDY | asked)
        assert "\n" not in str(error.value)
    # Column 0 is of a pass that runs all layers whatever it says.
    ignored = Prescribed(np.tile([0, *[1] * 11], (3, 1)))
    assert (
        rollout(model, prompts, policy=ignored, **GREEDY).depths_BT[:, :2].tolist() == [[5, 1]] * 3
    )


FORCED = {"threshold": Threshold(0.8), "prescribed": Prescribed(DEPTH_BT[:3, :12])}


@pytest.mark.parametrize("name", ["threshold", pytest.param("prescribed", marks=pytest.mark.slow)])
def test_forced_prefixes_go_on_as_if_decoding_had_never_stopped(model, prompts, name):
    asked, cuts = GREEDY | {"policy": FORCED[name], "hazards": True}, (5, 0, 9)
    whole = rollout(model, prompts, **asked)
    assert len(set(whole.depths_BT[:, 1:].flat)) > 2
    begun = [prompts[i] + whole.tokens_BT[i, :cut].tolist() for i, cut in enumerate(cuts)]
    asked |= {"max_new_tokens": 3, "size": EngineSize(rows=2, tick_rows=1)}
    made = rollout(model, begun, forced=cuts, **asked)
    row_B1 = np.arange(3)[:, None]
    after_BC = np.asarray(cuts)[:, None] + np.arange(3)
    for part in ("tokens_BT", "depths_BT", "logprobs_BT", "hazard_logits_BTE"):
        found, wanted = getattr(made, part), getattr(whole, part)[row_B1, after_BC]
        np.testing.assert_allclose(found, wanted, 0, LOGPROBS, err_msg=part)
    if name == "prescribed":  # and over data shards
        with jax.set_mesh(make_mesh(data=2)):
            divided = rollout(model, begun, forced=cuts, **asked)
        np.testing.assert_array_equal(divided.tokens_BT, made.tokens_BT)
        np.testing.assert_array_equal(divided.depths_BT, made.depths_BT)
    else:  # other depths than those of a prompt, so other keys and values
        prompt = rollout(model, begun, **asked)
        assert prompt.depths_BT[:, 0].tolist() == [LAYERS] * 3
        assert np.abs(prompt.logprobs_BT - made.logprobs_BT).max() > 100 * LOGPROBS


def test_a_model_on_a_mesh_stays_divided_along_its_heads(model):
    """Gathered along the width alone, also if it is given as a module, not as its parts."""
    with jax.set_mesh(make_mesh(fsdp=2, tensor=2)):
        for given in (model, nnx.split(model)):
            up = engine.Engine(given, adapters=True, hazards=False).model.blocks.mlp.up
            assert up.kernel[...].sharding.spec == P(None, None, "tensor")


@pytest.mark.slow
def test_forced_tokens_leave_as_often_as_the_hazards_say(model):
    """At the first exit, which no earlier token's depth has touched."""
    copies, begun = 250, [7, 3, 11, 30, 2]
    asked = GREEDY | {"max_new_tokens": 1, "hazards": True}
    asked |= {"policy": Sample(temperature=1.5, min_hazard=0.1)}
    made = rollout(model, [begun] * copies, forced=[3] * copies, **asked)
    z = float(forward(model, jnp.asarray([begun])).hazard_logits_BTE[0, -1, 0])
    np.testing.assert_allclose(made.hazard_logits_BTE[:, 0, 0], z, atol=LOGPROBS)
    hazard = 0.1 + 0.9 / (1 + np.exp(-z / 1.5))
    left = made.depths_BT[:, 0] == 1
    assert abs(left.mean() - hazard) < 4 * np.sqrt(hazard * (1 - hazard) / copies)
    np.testing.assert_allclose(made.depth_logprobs_BT[left, 0], np.log(hazard), atol=LOGPROBS)
    assert (made.depth_logprobs_BT[~left, 0] < np.log1p(-hazard)).all()


def test_compilation_is_counted_once(model, monkeypatch):
    """Even where nearly all of the time goes into compiling, the rest is above 0."""

    class Slow(weights.Copy):
        def of(self, graphdef, states, **settings):
            time.sleep(1.0)
            return super().of(graphdef, states, **settings)

    monkeypatch.setattr(engine, "KEPT", Slow())
    for program in (weights.apart, ticks.advance):
        program.clear_cache()
    assert rollout(model, [[3, 4, 5]], **GREEDY | {"max_new_tokens": 2}).seconds > 0
