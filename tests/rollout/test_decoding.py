"""The engine against teacher forcing, the plain loop, Hugging Face, and itself in other sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_loop import Made, plain

import jexit
from jexit.dist import make_mesh
from jexit.model import cache
from jexit.model.exits import depth_log_prob
from jexit.model.policies import Full, Prescribed, Sample, Threshold
from jexit.model.transformer import forward
from jexit.rollout import EngineSize, Rollouts, engine, prefill, rollout, scheduling, ticks
from jexit.rollout.prefill import prefill as prefill_program
from jexit.rollout.sampling import Sampling
from tolerances import LOGPROBS

LAYERS, DEPTHS, PAD, COLUMNS = 5, (1, 2, 4, 5), 59, 14
SMALL = EngineSize(rows=7, places=3)
DEPTH_BT = np.random.default_rng(1).choice(DEPTHS, (20, COLUMNS))
POLICIES = {
    "full": Full(),
    "sample": Sample(temperature=2.0, min_hazard=0.1),
    "threshold": Threshold(0.55),
    "prescribed": Prescribed(DEPTH_BT),
}
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


@pytest.fixture(scope="module")
def completed(model):
    """Twenty completions of ten prompts in a pool of seven rows, under every policy."""
    return {
        name: rollout(model, ten_prompts(), policy=policy, size=SMALL, **ASKED)
        for name, policy in POLICIES.items()
    }


def assert_same(made: Rollouts, other: Rollouts | Made) -> None:
    for name in ("lengths_B", "tokens_BT", "depths_BT"):
        np.testing.assert_array_equal(getattr(made, name), getattr(other, name), name)
    names = ["logprobs_BT", "depth_logprobs_BT"]
    names += ["hazard_logits_BTE"] * (made.hazard_logits_BTE is not None)
    for name in names:
        found, wanted = getattr(made, name), getattr(other, name)
        np.testing.assert_allclose(found, wanted, atol=LOGPROBS, equal_nan=True, err_msg=name)


def teacher_forced(model, made, *, temperature=1.0, top_p=1.0, adapters=True):
    """(sequences, log-probabilities of the tokens, output) of `forward` at the recorded depths."""
    sequences = made.sequences(30)
    policy = Prescribed(sequences.depth_BT)
    out = forward(model, sequences.tokens_BT, sequences.lengths_B, policy=policy, adapters=adapters)
    logits_BTV = Sampling.of(temperature, top_p).distribution(out.logits_BTV)
    following = sequences.tokens_BT[:, 1:, None]
    logprobs = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits_BTV))[:, :-1], following, axis=-1
    )[..., 0]
    return sequences, np.pad(logprobs, ((0, 0), (0, 1))), out


@pytest.mark.parametrize("name", POLICIES)
def test_equals_the_plain_loop(model, completed, name):
    wanted = plain(model, ten_prompts(), policy=POLICIES[name], **ASKED)
    assert len(set(wanted.lengths_B.tolist())) > 4, "completions should end at different times"
    assert_same(completed[name], wanted)
    assert completed[name].efficiency.prefills == 10


@pytest.mark.parametrize("name", [*POLICIES, "greedy"])
def test_records_equal_teacher_forcing(model, completed, name):
    policy, drawn_from = POLICIES.get(name, POLICIES["sample"]), {"temperature": 0.9, "top_p": 0.95}
    if name == "greedy":
        made, drawn_from = rollout(model, ten_prompts(), policy=policy, size=SMALL,
                                   **ASKED | {"temperature": 0.0}), {}  # fmt: skip
    else:
        made = completed[name]
    sequences, logprobs_BT, out = teacher_forced(model, made, **drawn_from)
    target, action = sequences.target_mask_BT, sequences.action_BT
    np.testing.assert_allclose(sequences.logprobs_BT[target], logprobs_BT[target], atol=LOGPROBS)
    assert not sequences.logprobs_BT[~target].any()
    if name == "greedy":
        best_BT = np.argmax(out.logits_BTV, -1)[:, :-1]
        assert (best_BT == sequences.tokens_BT[:, 1:])[target[:, :-1]].all()

    law = depth_log_prob(
        sequences.depth_BT, out.hazard_logits_BTE, DEPTHS[:-1], LAYERS, temperature=2.0,
        min_hazard=0.1,
    )  # fmt: skip
    expected_BT = np.where(action, law, 0.0) if policy.draws else np.zeros(action.shape)
    np.testing.assert_allclose(sequences.depth_logprobs_BT, expected_BT, atol=LOGPROBS)
    seen = set(sequences.depth_BT[action].tolist())
    assert seen == {LAYERS} if name == "full" else len(seen) > 2

    for row, start in enumerate(made.prompt_lengths_B):
        assert made.depths_BT[row, 0] == LAYERS
        assert np.isnan(made.hazard_logits_BTE[row, 0]).all()
        for i in range(1, made.lengths_B[row]):
            depth, z_E = made.depths_BT[row, i], made.hazard_logits_BTE[row, i]
            reached = np.asarray(DEPTHS[:-1]) <= depth
            assert np.isnan(z_E[~reached]).all()
            forced_E = out.hazard_logits_BTE[row, start + i - 1]
            np.testing.assert_allclose(z_E[reached], forced_E[reached], atol=LOGPROBS)
            if name == "threshold":
                over = 1 / (1 + np.exp(-z_E[reached])) > 0.55
                assert not over[:-1].any() and (depth == LAYERS or over[-1])
            if name == "prescribed":
                assert depth == DEPTH_BT[row, i]


def test_sizes_and_stacked_weights_change_nothing(model, completed, monkeypatch):
    """As many rows as completions, and one; weights as accelerators have them."""
    asked = ASKED | {"policy": POLICIES["sample"]}
    for size in (EngineSize(rows=20, places=20), EngineSize(rows=1, places=1)):
        assert_same(rollout(model, ten_prompts(), size=size, **asked), completed["sample"])
    monkeypatch.setattr(engine, "on_cpu", lambda: False)
    assert_same(rollout(model, ten_prompts(), size=SMALL, **asked), completed["sample"])


# One shape of everything, so that the examples share two programs.
@settings(max_examples=15)
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
    made = rollout(model, prompts, size=EngineSize(rows=5, places=2), **asked)
    assert_same(made, plain(model, prompts, **asked))


def test_a_ring_of_prompts_smaller_than_the_list(model, monkeypatch):
    """Prompts are prefilled as others have begun, into their slots."""
    monkeypatch.setitem(scheduling.PREFILL_TOKENS, "cpu", 64)  # groups of 4, of 2 and of 1
    asked = ASKED | {"policy": Sample(), "top_p": 1.0, "hazards": False, "max_new_tokens": 9}
    prompts = 3 * ten_prompts()
    made = rollout(model, prompts, size=EngineSize(rows=5, places=2), **asked)
    assert_same(made, plain(model, prompts, **asked))
    assert made.efficiency.prefills == 30


def test_finished_rows_make_room_at_once(model):
    """Completions of many lengths over two rows: each takes the row that is free first."""
    prompts = [[5, token] for token in range(24)]
    asked = {"max_new_tokens": 40, "eos_ids": (60, 7, 12, 33), "pad_id": PAD, "key": 0}
    made = rollout(model, prompts, size=EngineSize(rows=2, places=2), **asked)
    assert made.lengths_B.min() < 4 and made.lengths_B.max() > 20
    busy = [0, 0]
    for length in made.lengths_B.tolist():
        # A tick a token, of which the prefill drew one; at least the tick that takes the row.
        busy[busy.index(min(busy))] += max(length - 1, 1)
    # And one for the last token of all, which nobody's next pass goes with.
    assert made.efficiency.ticks == max(busy) + 1


def test_depths_follow_their_law(model):
    """Frequencies of the first free depth of many samples against the recorded probabilities."""
    asked = GREEDY | {"max_new_tokens": 2, "samples_per_prompt": 4000}
    made = rollout(model, [[5, 8]], policy=Sample(), **asked)
    depths, logprobs, total = made.depths_BT[:, 1], made.depth_logprobs_BT[:, 1], 0.0
    for depth in np.unique(depths):
        (logprob,) = np.unique(np.round(logprobs[depths == depth], 5))
        p = np.exp(logprob)
        total += p
        assert abs(np.mean(depths == depth) - p) < 5 * np.sqrt(p * (1 - p) / 4000)
    assert total == pytest.approx(1.0, abs=1e-4)


def test_without_adapters_it_is_the_teacher(model, prompts):
    teacher = rollout(model, prompts, adapters=False, **GREEDY)
    sequences, logprobs_BT, _ = teacher_forced(model, teacher, adapters=False)
    target = sequences.target_mask_BT
    np.testing.assert_allclose(sequences.logprobs_BT[target], logprobs_BT[target], atol=LOGPROBS)
    student = rollout(model, prompts, **GREEDY)
    assert not np.allclose(student.logprobs_BT, teacher.logprobs_BT, atol=0.01)


@pytest.mark.parametrize(
    ("family", "tied", "seed", "gain"),
    [("qwen2", False, 9, 1.0), ("qwen3", True, 2, 6.0), ("llama", False, 8, 1.0)],
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


def test_larger_caches_on_the_way_change_nothing(model, prompts, monkeypatch):
    def run():
        asked = ASKED | {"max_new_tokens": 40, "hazards": False, "top_p": 1.0}
        return rollout(model, prompts, policy=Sample(), **asked)

    one = run()
    monkeypatch.setattr(cache, "SMALLEST_CACHE", 16)  # caches of 32 and 64 slots in place of one
    several = run()
    assert one.shape != several.shape or one.lengths_B.max() < 16
    assert_same(several, one)


def test_rows_depend_on_key_prompt_and_sample_alone(model, prompts):
    asked = ASKED | {"policy": Sample(), "samples_per_prompt": 3, "hazards": False, "top_p": 1.0}
    together = rollout(model, prompts, **asked)
    assert together.prompt_lengths_B.tolist() == [3] * 3 + [11] * 3 + [6] * 3
    for group in together.tokens_BT.reshape(3, 3, -1):
        assert len(np.unique(group, axis=0)) == 3, "samples of a prompt should differ"
    for index, prompt in enumerate(prompts):
        alone = rollout(model, [prompt], first_prompt=index, **asked)
        rows = slice(3 * index, 3 * index + 3)
        np.testing.assert_array_equal(alone.tokens_BT, together.tokens_BT[rows])
        np.testing.assert_array_equal(alone.depths_BT, together.depths_BT[rows])
        np.testing.assert_allclose(alone.logprobs_BT, together.logprobs_BT[rows], atol=LOGPROBS)
    other = rollout(model, prompts, **asked | {"key": jax.random.key(1)})
    assert (other.tokens_BT != together.tokens_BT).any()


def test_any_end_token_stops_a_row_and_is_kept(model, prompts):
    free = rollout(model, prompts, **GREEDY)
    assert free.truncated_B.all() and free.lengths_B.tolist() == [12] * 3
    ends = [int(free.tokens_BT[0, 4]), int(free.tokens_BT[1, 0])]
    stopped = rollout(model, prompts, **GREEDY | {"eos_ids": ends})
    for row in range(3):
        tokens = free.tokens_BT[row].tolist()
        stops = [tokens.index(end) + 1 for end in ends if end in tokens]
        length = min(stops, default=12)
        assert stopped.completion(row) == tokens[:length]
        assert stopped.truncated_B[row] == (not stops)
        assert (stopped.tokens_BT[row, length:] == PAD).all()
        for record in (stopped.depths_BT, stopped.logprobs_BT, stopped.depth_logprobs_BT):
            assert not record[row, length:].any()
    assert stopped.lengths_B[1] == 1


def test_sequences_line_up(completed):
    made = completed["sample"]
    sequences = made.sequences(40)
    for row, prompt in enumerate(np.repeat(np.asarray(ten_prompts(), object), 2)):
        start, new = len(prompt), int(made.lengths_B[row])
        padding = [PAD] * (40 - start - new)
        assert sequences.tokens_BT[row].tolist() == prompt + made.completion(row) + padding
        assert sequences.lengths_B[row] == start + new
        assert (sequences.depth_BT[row, :start] == LAYERS).all()
        after = slice(start, start + new - 1)
        np.testing.assert_array_equal(sequences.depth_BT[row, after], made.depths_BT[row, 1:new])
        assert np.flatnonzero(sequences.action_BT[row]).tolist() == list(range(40))[after]
        target = list(range(start - 1, start + new - 1))
        assert np.flatnonzero(sequences.target_mask_BT[row]).tolist() == target
    with pytest.raises(ValueError, match="cannot hold"):
        made.sequences(10)


def test_prompts_are_prefilled_once_and_with_those_of_like_length(model, monkeypatch):
    shapes, whole = [], prefill.run

    def seen(model, tokens_BT, **asked):
        shapes.append(tokens_BT.shape)
        return whole(model, tokens_BT, **asked)

    monkeypatch.setattr(prefill, "run", seen)
    prompts = [[5] * length for length in (3, 11, 6)]
    made = rollout(model, prompts, samples_per_prompt=7, **GREEDY | {"max_new_tokens": 1})
    assert made.rows == 21 and shapes == [(3, 16)]
    assert made.efficiency.prefills == 3
    assert made.efficiency.prompt_padding == pytest.approx(1 - 20 / 48)

    shapes.clear()
    monkeypatch.setitem(scheduling.PREFILL_TOKENS, "cpu", 128)  # two prompts of up to 64 tokens
    lengths = [60, 3, 17, 64, 5, 20]
    prompts = [[length % 60] * length for length in lengths]
    made = rollout(model, prompts, **GREEDY | {"max_new_tokens": 1})
    assert shapes == [(2, 16), (2, 32), (2, 64)]
    assert made.efficiency.prompt_padding == pytest.approx(1 - sum(lengths) / 224)


def test_programs_multiply_with_neither_prompt_lengths_nor_parameters(model, prompts):
    """One prefill a prompt bucket, and ticks for each size of the cache and of the prompts."""

    def programs():
        return np.asarray([prefill_program._cache_size(), ticks.advance._cache_size()])

    before, counts = programs(), []
    for length in (1, 16, 17, 24):
        rollout(model, [[3] * length], **GREEDY | {"max_new_tokens": 41})
        counts.append(programs() - before)
    expected = [1, 1, 2, 2]  # prompts in 16 and 32 slots; caches of 128
    assert np.transpose(counts).tolist() == [expected, expected]

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


def test_ticks_copy_neither_cache_nor_weights(model, prompts, monkeypatch):
    """Temporaries of a layer's keys and values at a time, and no scan over stacked weights.

    What a scan is given to slice is copied whether or not a branch reads it.
    """
    traced, whole = [], ticks.advance

    def trace(graphdef, states, layers, pool, *asked, **static):
        larger = dataclasses.replace(pool, cache=engine.pool.grown(pool.cache, slots=1024))
        traced.append(whole.trace(graphdef, states, layers, larger, *asked, **static))
        return whole(graphdef, states, layers, pool, *asked, **static)

    trace._cache_size = whole._cache_size
    monkeypatch.setattr(ticks, "advance", trace)
    rollout(model, prompts, samples_per_prompt=4, policy=Sample(), hazards=True, **GREEDY)
    program = traced[0]
    cache_bytes = LAYERS * 12 * model.arch.kv_heads * 1024 * model.arch.head_dim * 4  # keys alone
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
        ([], {}, "no prompts"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 512], {}, "prompt 0 has 512 tokens and the model takes 512 positions"),
        ([[1] * 505], {}, "lower max_new_tokens to at most 7"),
        ([[61]], {}, "token 61"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"max_new_tokens": 3.0}, r"max_new_tokens is 3\.0; it must be a whole number"),
        ([[1]], {"samples_per_prompt": 0}, "samples_per_prompt is 0"),
        ([[1]], {"top_k": 2.5}, r"top_k is 2\.5; it is how many"),
        ([[1]], {"policy": Prescribed(np.ones((2, 12)))}, r"\(2, 12\) for 1 rows of up to 12"),
        ([[1]], {"policy": Prescribed(np.ones((1, 11)))}, r"\(1, 11\) for 1 rows"),
        ([[1]], {"policy": Prescribed(np.ones(12))}, r"\(12,\) for 1 rows .* or Fixed\(depth\)"),
        ([[1]], {"policy": Prescribed(np.full((1, 12), 3))}, r"depth 3; .* exits \(1, 2, 4\)"),
        ([[1]], {"policy": Sample(temperature=-1.0)}, r"temperature -1\.0; .* above 0"),
        ([[1]], {"policy": "sample"}, "policy is 'sample'; give a policy, such as"),
        ([[1]], {"forced": [0, 1]}, "forced has 2 numbers for 1 prompts"),
        ([[1, 2]], {"forced": [2]}, "prompt 0 has 2 tokens, of which 2 are said"),
        ([[1, 2]], {"forced": [-1]}, "a number from 0 to 1"),
        ([[1, 2]], {"forced": [1], "policy": Prescribed(np.ones((1, 12)))}, "up to 13 tokens"),
        (
            [[1, 2]],
            {"forced": [1], "policy": Prescribed(np.ones((2, 13))), "samples_per_prompt": 2},
            "2 samples share one prefill",
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


@pytest.mark.parametrize("name", FORCED)
def test_forced_prefixes_go_on_as_if_decoding_had_never_stopped(model, prompts, name):
    asked, cuts = GREEDY | {"policy": FORCED[name], "hazards": True}, (5, 0, 9)
    whole = rollout(model, prompts, **asked)
    assert len(set(whole.depths_BT[:, 1:].flat)) > 2
    begun = [prompts[i] + whole.tokens_BT[i, :cut].tolist() for i, cut in enumerate(cuts)]
    asked |= {"max_new_tokens": 3, "size": EngineSize(rows=2, places=1)}
    made = rollout(model, begun, forced=cuts, **asked)
    for row, cut in enumerate(cuts):
        part = slice(cut, cut + 3)
        np.testing.assert_array_equal(made.tokens_BT[row], whole.tokens_BT[row, part])
        np.testing.assert_array_equal(made.depths_BT[row], whole.depths_BT[row, part])
        for one, other in (
            (made.logprobs_BT[row], whole.logprobs_BT[row, part]),
            (made.hazard_logits_BTE[row], whole.hazard_logits_BTE[row, part]),
        ):
            np.testing.assert_allclose(one, other, atol=LOGPROBS, equal_nan=True)
    with pytest.raises(ValueError, match="went on from forced prefixes"):
        made.sequences()
    if name == "prescribed":  # and over data shards
        with jax.set_mesh(make_mesh(data=2)):
            divided = rollout(model, begun, forced=cuts, **asked)
        np.testing.assert_array_equal(divided.tokens_BT, made.tokens_BT)
        np.testing.assert_array_equal(divided.depths_BT, made.depths_BT)
    else:  # other depths than those of a prompt, so other keys and values
        prompt = rollout(model, begun, **asked)
        assert prompt.depths_BT[:, 0].tolist() == [LAYERS] * 3
        assert np.abs(prompt.logprobs_BT - made.logprobs_BT).max() > 100 * LOGPROBS


def test_forced_tokens_leave_as_often_as_the_hazards_say(model):
    """At the first exit, which no earlier token's depth has touched."""
    copies, begun = 400, [7, 3, 11, 30, 2]
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
