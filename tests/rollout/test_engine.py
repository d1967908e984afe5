"""The engine against teacher forcing, Hugging Face, and itself in other batches and buckets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jexit
from jexit.model import cache
from jexit.model.exits import depth_log_prob
from jexit.model.policies import Full, Prescribed, Sample, Threshold, law_settings
from jexit.model.transformer import forward
from jexit.rollout import layout, programs, rollout, ticks
from jexit.rollout.sampling import Sampling
from tolerances import LOGPROBS

LAYERS, EOS, PAD = 5, 60, 59


def roll(model, prompts, **settings):
    defaults = {"max_new_tokens": 12, "eos_ids": (), "pad_id": PAD, "key": 0}
    return rollout(model, prompts, **defaults | settings)


def teacher_forced(model, rollouts, *, temperature=1.0, top_p=1.0, adapters=True):
    """(sequences, log-probabilities of the tokens, output) of `forward` at the recorded depths."""
    sequences = rollouts.sequences()
    out = forward(
        model,
        sequences.tokens_BT,
        sequences.lengths_B,
        policy=Prescribed(sequences.depth_BT),
        adapters=adapters,
    )
    log_probs = np.asarray(jax.nn.log_softmax(Sampling.of(temperature, top_p).law(out.logits_BTV)))
    following = sequences.tokens_BT[:, 1:, None]
    logprobs = np.take_along_axis(log_probs[:, :-1], following, axis=-1)[..., 0]
    return sequences, np.pad(logprobs, ((0, 0), (0, 1))), out


POLICIES = {
    "full": Full(),
    "sample": Sample(),
    "sample_law": Sample(temperature=2.0, min_hazard=0.1),
    "threshold": Threshold(0.55),
}


@pytest.mark.parametrize(
    ("name", "temperature", "top_p"),
    [
        ("full", 0.7, 0.9),
        ("sample", 0.7, 0.9),
        ("threshold", 0.7, 0.9),
        ("sample_law", 0.7, 0.9),
        ("sample_law", 1.0, 1.0),
        ("sample_law", 0.0, 1.0),
    ],
)
def test_records_equal_teacher_forcing(model, prompts, name, temperature, top_p):
    policy = POLICIES[name]
    rollouts = roll(
        model,
        prompts,
        policy=policy,
        temperature=temperature,
        top_p=top_p,
        samples_per_prompt=4,
        eos_ids=(EOS, 7, 12),
        hazards=True,
    )
    forced_at = {"temperature": temperature, "top_p": top_p} if temperature else {}
    sequences, logprobs_BT, out = teacher_forced(model, rollouts, **forced_at)
    target, action = sequences.target_mask_BT, sequences.action_BT
    np.testing.assert_allclose(sequences.logprobs_BT[target], logprobs_BT[target], atol=LOGPROBS)
    assert not sequences.logprobs_BT[~target].any()

    if isinstance(policy, Sample):
        law = depth_log_prob(
            sequences.depth_BT,
            out.hazard_logits_BTE,
            model.exit_layers,
            LAYERS,
            **law_settings(policy),
        )
        expected_BT = np.where(action, law, 0.0)
        assert len(np.unique(sequences.depth_BT)) == 4, "every depth should have been drawn"
    else:
        expected_BT = np.zeros(action.shape)
    np.testing.assert_allclose(sequences.depth_logprobs_BT, expected_BT, atol=LOGPROBS)

    for row, start in enumerate(rollouts.prompt_lengths_B):
        assert np.isnan(rollouts.hazard_logits_BTE[row, 0]).all()
        assert np.isnan(rollouts.hazard_logits_BTE[row, rollouts.lengths_B[row] :]).all()
        for i in range(1, rollouts.lengths_B[row]):
            depth, z_E = rollouts.depths_BT[row, i], rollouts.hazard_logits_BTE[row, i]
            reached = np.asarray(model.exit_layers) <= depth
            np.testing.assert_allclose(
                z_E[reached], out.hazard_logits_BTE[row, start + i - 1][reached], atol=LOGPROBS
            )
            assert np.isnan(z_E[~reached]).all()
            if isinstance(policy, Threshold):
                over = 1 / (1 + np.exp(-z_E[reached])) > policy.hazard
                assert over[:-1].sum() == 0, "it should have left at the first exit over it"
                assert depth == LAYERS or over[-1]


def test_depths_follow_their_law(model):
    """Frequencies of the first free depth of many samples against the recorded probabilities."""
    rollouts = roll(
        model, [[5, 8]], policy=Sample(), max_new_tokens=2, temperature=0.0, samples_per_prompt=4000
    )
    depths, logprobs = rollouts.depths_BT[:, 1], rollouts.depth_logprobs_BT[:, 1]
    total = 0.0
    for depth in np.unique(depths):
        (logprob,) = np.unique(np.round(logprobs[depths == depth], 5))
        p = np.exp(logprob)
        total += p
        assert abs(np.mean(depths == depth) - p) < 5 * np.sqrt(p * (1 - p) / 4000)
    assert total == pytest.approx(1.0, abs=1e-4)


def test_prescribed_depths_are_run(model, prompts):
    depth_BT = np.random.default_rng(1).choice([1, 2, 3, 4, 5, 99], (3, 15))
    rollouts = roll(model, prompts, policy=Prescribed(depth_BT), temperature=0.0)
    expected = np.minimum(depth_BT[:, :12], LAYERS)
    expected[:, 0] = LAYERS
    np.testing.assert_array_equal(rollouts.depths_BT, expected)
    sequences, logprobs_BT, out = teacher_forced(model, rollouts)
    target = sequences.target_mask_BT
    np.testing.assert_allclose(sequences.logprobs_BT[target], logprobs_BT[target], atol=LOGPROBS)
    assert not sequences.depth_logprobs_BT.any(), "nothing was drawn"
    best_BT = np.argmax(out.logits_BTV, -1)
    np.testing.assert_array_equal(
        best_BT[:, :-1][target[:, :-1]], sequences.tokens_BT[:, 1:][target[:, :-1]]
    )


def test_without_adapters_it_is_the_teacher(model, prompts):
    teacher = roll(model, prompts, adapters=False, temperature=0.0)
    sequences, logprobs_BT, _ = teacher_forced(model, teacher, adapters=False)
    target = sequences.target_mask_BT
    np.testing.assert_allclose(sequences.logprobs_BT[target], logprobs_BT[target], atol=LOGPROBS)
    student = roll(model, prompts, temperature=0.0)
    assert not np.allclose(student.logprobs_BT, teacher.logprobs_BT, atol=0.01)


def test_bucket_boundaries_change_nothing(model, prompts, monkeypatch):
    def run():
        return roll(model, prompts, policy=Sample(), max_new_tokens=40, samples_per_prompt=2)

    one = run()
    monkeypatch.setattr(cache, "SMALLEST_CACHE", 16)  # caches of 32 and 64 slots in place of one
    several = run()
    np.testing.assert_array_equal(one.tokens_BT, several.tokens_BT)
    np.testing.assert_array_equal(one.depths_BT, several.depths_BT)
    np.testing.assert_allclose(one.logprobs_BT, several.logprobs_BT, atol=LOGPROBS)


def test_buckets_hold_what_they_must_and_little_more():
    for length in range(1, 3000):
        padded = cache.prompt_bucket(length)
        assert length <= padded <= max(length + 15, 1.25 * length)
        assert length <= cache.cache_bucket(length, 3000) <= max(128, 2 * length)
    assert len({cache.prompt_bucket(length) for length in range(1, 4097)}) < 32
    assert cache.cache_bucket(100, 100) == 128
    assert cache.cache_bucket(200, 210) == 224


def test_rows_do_not_depend_on_the_batch(model, prompts):
    settings = {"policy": Sample(), "samples_per_prompt": 3, "eos_ids": (EOS, 7)}
    together = roll(model, prompts, **settings)
    for index, prompt in enumerate(prompts):
        alone = roll(model, [prompt], first_prompt=index, **settings)
        rows = slice(3 * index, 3 * index + 3)
        np.testing.assert_array_equal(alone.tokens_BT, together.tokens_BT[rows])
        np.testing.assert_array_equal(alone.depths_BT, together.depths_BT[rows])
        np.testing.assert_allclose(alone.logprobs_BT, together.logprobs_BT[rows], atol=LOGPROBS)


def test_samples_share_a_prompt_and_differ(model, prompts):
    settings = {"samples_per_prompt": 3, "policy": Sample(), "eos_ids": (EOS, 7)}
    rollouts = roll(model, prompts, **settings)
    assert rollouts.rows == 9
    assert rollouts.prompt_lengths_B.tolist() == [3] * 3 + [11] * 3 + [6] * 3
    for group in rollouts.tokens_BT.reshape(3, 3, -1):
        assert len(np.unique(group, axis=0)) == 3
    again = roll(model, prompts, **settings)
    np.testing.assert_array_equal(again.tokens_BT, rollouts.tokens_BT)
    other = roll(model, prompts, **settings | {"key": jax.random.key(1)})
    assert (other.tokens_BT != rollouts.tokens_BT).any()


def test_samples_share_one_prefill(model, prompts, monkeypatch):
    shapes = []
    whole = programs.run

    def seen(model, tokens_BT, **settings):
        shapes.append(tokens_BT.shape)
        return whole(model, tokens_BT, **settings)

    monkeypatch.setattr(programs, "run", seen)
    rollouts = roll(model, prompts, samples_per_prompt=7, max_new_tokens=1)
    assert rollouts.rows == 21
    assert shapes == [(3, 16)]
    assert rollouts.efficiency.prefills == 3
    assert rollouts.efficiency.prompt_padding == pytest.approx(1 - 20 / 48)


def test_prompts_of_like_length_are_prefilled_together(model, monkeypatch):
    """In groups of one size, each as long as its longest prompt."""
    monkeypatch.setitem(layout.PREFILL_TOKENS, "cpu", 128)  # two prompts of up to 64 tokens
    shapes = []
    whole = programs.run

    def seen(model, tokens_BT, **settings):
        shapes.append(tokens_BT.shape)
        return whole(model, tokens_BT, **settings)

    monkeypatch.setattr(programs, "run", seen)
    lengths = [60, 3, 17, 64, 5, 20]
    made = roll(model, [[length % 60] * length for length in lengths], max_new_tokens=4)
    assert shapes == [(2, 16), (2, 32), (2, 64)]
    assert made.efficiency.prompt_padding == pytest.approx(1 - sum(lengths) / 224)


def test_programs_do_not_multiply_with_prompt_lengths(model):
    """One prefill a prompt bucket, and ticks for each size of the cache and of the prompts."""
    before = np.asarray([programs.prefill._cache_size(), programs.advance._cache_size()])
    counts = []
    for length in (1, 9, 16, 17, 24, 60, 64, 65, 70, 80):
        roll(model, [[3] * length], temperature=0.0, max_new_tokens=41)
        counts.append([programs.prefill._cache_size(), programs.advance._cache_size()] - before)
    # Prompts in 16, 32, 64 and 80 slots; caches of 128.
    expected = [1, 1, 1, 2, 2, 3, 3, 4, 4, 4]
    assert np.transpose(counts).tolist() == [expected, expected]


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
    traced = []
    whole = programs.advance

    def trace(graphdef, states, layers, pool, *settings, **static):
        larger = dataclasses.replace(pool, cache=programs.grown(pool.cache, slots=1024))
        traced.append(whole.trace(graphdef, states, layers, larger, *settings, **static))
        return whole(graphdef, states, layers, pool, *settings, **static)

    trace._cache_size = whole._cache_size
    monkeypatch.setattr(programs, "advance", trace)
    roll(model, prompts, samples_per_prompt=4, policy=Sample(), hazards=True)
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


def test_any_end_token_stops_a_row_and_is_kept(model, prompts):
    free = roll(model, prompts, temperature=0.0)
    assert free.truncated_B.all()
    assert free.lengths_B.tolist() == [12] * 3
    ends = [int(free.tokens_BT[0, 4]), int(free.tokens_BT[1, 0])]
    stopped = roll(model, prompts, temperature=0.0, eos_ids=ends)
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


def test_a_tick_runs_the_layers_that_its_rows_need(model, prompts, monkeypatch):
    """The layer loop's own count: a row that has ended keeps nobody running."""
    depth_BT = np.full((3, 12), 1)
    settings = {"temperature": 0.0, "policy": Prescribed(depth_BT)}
    tokens_BT = np.asarray(roll(model, prompts, max_new_tokens=11, **settings).tokens_BT)
    # A row whose first token, drawn at full depth, no other row ever says.
    row = next(r for r in range(3) if tokens_BT[r, 0] not in np.delete(tokens_BT, r, axis=0))
    depth_BT[row] = LAYERS
    ran = []
    whole = ticks.at_layer

    def counted(layer, blocks, apart, function, *operands):
        if function.__name__ != "output":  # the second half of what began with "inputs"
            jax.debug.callback(lambda layer: ran.append(int(layer)), layer)
        return whole(layer, blocks, apart, function, *operands)

    monkeypatch.setattr(ticks, "at_layer", counted)
    # Records of 16 columns, as nowhere else: the ticks are traced anew, and no other test meets the
    # callback.
    monkeypatch.setattr(layout, "LEAST_COLUMNS", 16)
    ends = [int(tokens_BT[row, 0])]
    rollouts = roll(model, prompts, eos_ids=ends, max_new_tokens=11, **settings)
    jax.effects_barrier()
    assert rollouts.lengths_B.tolist() == [1 if r == row else 11 for r in range(3)]
    # Ten passes of one layer each, and the other four skipped in every one of them.
    assert ran.count(0) == 10
    assert [ran.count(layer) for layer in range(1, LAYERS)] == [10] * 4


def test_new_parameter_values_do_not_recompile(model, prompts):
    graphdef, trained, rest = nnx.split(model, nnx.filterlib.OfType(type(model.exits.b2)), ...)
    before = roll((graphdef, trained, rest), prompts, policy=Sample())
    compiled = programs.advance._cache_size(), programs.prefill._cache_size()
    moved = jax.tree.map(lambda x: x - 100.0, trained)
    after = roll((graphdef, moved, rest), prompts, policy=Sample(), key=4)
    assert (programs.advance._cache_size(), programs.prefill._cache_size()) == compiled
    assert (before.depths_BT < LAYERS).any()
    assert (after.depths_BT == LAYERS).all(), "hazards near nothing"


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
    found = roll(
        ours, prompts, temperature=0.0, max_new_tokens=60, eos_ids=eos_ids, pad_id=tokenizer.pad_id
    )
    assert [found.completion(row) for row in range(len(prompts))] == expected


def test_sequences_line_up(model, prompts):
    rollouts = roll(model, prompts, policy=Sample(), eos_ids=(EOS, 7), samples_per_prompt=3)
    sequences = rollouts.sequences(40)
    for row in range(9):
        prompt = prompts[row // 3]
        start, new = len(prompt), int(rollouts.lengths_B[row])
        assert sequences.tokens_BT[row].tolist() == (
            prompt + rollouts.completion(row) + [PAD] * (40 - start - new)
        )
        assert sequences.lengths_B[row] == start + new
        assert (sequences.depth_BT[row, :start] == LAYERS).all()
        for i in range(new - 1):
            assert sequences.depth_BT[row, start + i] == rollouts.depths_BT[row, i + 1]
        assert np.flatnonzero(sequences.action_BT[row]).tolist() == list(
            range(start, start + new - 1)
        )
        assert np.flatnonzero(sequences.target_mask_BT[row]).tolist() == list(
            range(start - 1, start + new - 1)
        )
    with pytest.raises(ValueError, match="cannot hold"):
        rollouts.sequences(10)


@pytest.mark.parametrize(
    ("prompts", "settings", "sentence"),
    [
        ([], {}, "no prompts"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 512], {}, "prompt 0 has 512 tokens and the model takes 512 positions"),
        ([[1] * 505], {}, "lower max_new_tokens to at most 7"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"samples_per_prompt": 0}, "samples_per_prompt is 0"),
        ([[1]], {"policy": Prescribed(jnp.ones((2, 12)))}, r"\(2, 12\) for 1 rows"),
        ([[1]], {"policy": Prescribed(jnp.ones((1, 11)))}, "up to 12 tokens"),
        ([[61]], {}, "token 61"),
    ],
)
def test_wrong_inputs_get_one_sentence(model, prompts, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        roll(model, prompts, **settings)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"policy": Sample(temperature=-1.0)}, r"temperature -1\.0; .* give a number above 0"),
        ({"policy": Sample(min_hazard=2.0)}, r"min_hazard 2\.0; it is a probability"),
        ({"policy": Threshold(float("nan"))}, "hazard nan; give the hazard above which"),
        ({"top_k": 2.5}, r"top_k is 2\.5; it is how many"),
        ({"max_new_tokens": 3.0}, r"max_new_tokens is 3\.0; it must be a whole number"),
    ],
)
def test_settings_that_mean_nothing_are_refused(model, prompts, asked, says):
    known = {"max_new_tokens": 3, "eos_ids": (), "pad_id": 0, "key": 0}
    with pytest.raises(ValueError, match=says):
        rollout(model, prompts, **known | asked)
