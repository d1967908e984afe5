"""Hazards of completions against the engine's own, and reliability against hand figures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jexit.config import EngineSize, ExitSettings, LoRA
from jexit.dist import make_mesh
from jexit.evaluation.hazards import hazard_calibration, hazards_of, reliability
from jexit.evaluation.replay import Recorded
from jexit.model.policies import Full, Prescribed, Sample
from jexit.model.transformer import Transformer, exit_hidden_states, logits_of, run
from jexit.rollout import rollout
from jexit.steps.state import split_model
from small_runs import small_model
from tolerances import LOGPROBS

EXITS, LAYERS, VOCABULARY = (1, 2), 3, 31
PROMPTS = [[4, 9, 1], [7, 7, 20, 3, 2], [11], [30, 2], [5, 6, 7]]


@pytest.fixture(scope="module")
def split():
    """A small model with adapters that are not at their start."""
    arch = small_model(VOCABULARY).arch
    model = Transformer(
        dataclasses.replace(arch, vocab_size=VOCABULARY),
        exit_layers=EXITS,
        exit_head=ExitSettings(bias=-0.5),
        lora=LoRA(rank=2, alpha=4.0, targets=("q", "v", "up")),
        rngs=nnx.Rngs(0),
    )
    split = split_model(model, full=False)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    trainable = jax.tree.map(
        lambda leaf: leaf + 0.5 * jax.random.normal(next(keys), leaf.shape), split.trainable
    )
    return split._replace(trainable=trainable)


LAW = Sample(temperature=2.0, min_hazard=0.3)
SAMPLES = 80


@pytest.fixture(scope="module")
def made(split):
    return rollout(
        split.decodable(split.trainable), PROMPTS, policy=LAW, max_new_tokens=9, temperature=1.0,
        eos_ids=(3, 8), pad_id=0, key=5, hazards=True, samples_per_prompt=SAMPLES,
        size=EngineSize(rows=len(PROMPTS) * SAMPLES),
    )  # fmt: skip


def recorded_of(made, rows):
    return Recorded(
        [PROMPTS[made.prompt_B[row]] for row in rows],
        [made.completion(row) for row in rows],
        [made.depths_BT[row, : made.lengths_B[row]].tolist() for row in rows],
        0,
    )


@pytest.fixture(scope="module")
def recorded(made):
    """Two completions of each prompt."""
    recorded = recorded_of(made, [row for row in range(made.rows) if row % SAMPLES < 2])
    assert len({depth for row in recorded.depths for depth in row[1:]}) == LAYERS
    return recorded


def test_hazards_are_those_of_decoding_and_how_often_tokens_leave(split, made):
    found = hazards_of(split.decodable(split.trainable), recorded_of(made, range(made.rows)), LAW)
    decisions = {layer: [] for layer in EXITS}  # each hazard that was asked, and whether it left
    for row, tokens in enumerate(found):
        assert len(tokens) == made.lengths_B[row]
        assert tokens[0] == [None, None]  # the prompt's last pass asks nobody
        z_TE = made.hazard_logits_BTE[row, 1 : len(tokens)]
        hazards_TE = np.asarray(tokens[1:], float).reshape(-1, len(EXITS))  # None becomes NaN
        wanted_TE = 0.3 + 0.7 / (1 + np.exp(-z_TE / 2.0))
        np.testing.assert_allclose(hazards_TE, wanted_TE, atol=LOGPROBS, equal_nan=True)
        for hazards, depth in zip(hazards_TE, made.depths_BT[row, 1:], strict=False):
            assert [not np.isnan(h) for h in hazards] == [depth >= layer for layer in EXITS]
            for layer, hazard in zip(EXITS, hazards, strict=True):
                if depth >= layer:
                    decisions[layer].append((hazard, depth == layer))
    for layer in EXITS:
        hazard_N, left_N = np.array(decisions[layer]).T
        # Five standard errors of a mean of independent decisions.
        slack = 5 * np.sqrt(np.mean(hazard_N * (1 - hazard_N)) / len(hazard_N))
        assert abs(left_N.mean() - hazard_N.mean()) < slack < 0.1


def by_hand(split, recorded, target, sharpness):
    """(exit, hazard, target) of every decision, and KL(student ‖ teacher) of every pass that could
    leave, from whole soft-maxes."""
    student, teacher = split.student(split.trainable), split.teacher(split.trainable)

    @jax.jit
    def whole(tokens, depth):
        made = run(student, tokens, policy=Prescribed(depth), hazards=True)
        taught = run(
            teacher, tokens, policy=Full(), adapters=False, residual_layers=student.exit_layers
        )
        lens, speaker = taught, teacher
        if target != "teacher":
            lens = run(student, tokens, policy=Full(), residual_layers=student.exit_layers)
            speaker = student
        final = jax.nn.log_softmax(logits_of(taught.hidden_BTD, teacher.head_VD))
        hidden = exit_hidden_states(speaker, lens.residual_RBTD, None)
        exits = jax.nn.log_softmax(logits_of(hidden, speaker.head_VD))
        last = final
        if target == "own":
            last = jax.nn.log_softmax(logits_of(lens.hidden_BTD, student.head_VD))
        shallow = jax.nn.log_softmax(logits_of(made.hidden_BTD, student.head_VD))
        kl_BT = jnp.sum(jnp.exp(shallow) * (shallow - final), -1)
        kl_EBT = jnp.sum(jnp.exp(last) * (last - exits), -1)
        hazard_BTE = jax.nn.sigmoid(made.hazard_logits_BTE)
        return kl_BT[0], 1 - jnp.tanh(sharpness * kl_EBT[:, 0] / 2), hazard_BTE[0]

    decisions, divergences = [], []
    rows = zip(recorded.prompts, recorded.completions, recorded.depths, strict=True)
    for prompt, ids, depths in rows:
        # What follows a text changes nothing before it: padding it makes one program of all.
        tokens = np.zeros((1, 16), np.int32)
        tokens[0, : len(prompt) + len(ids)] = [*prompt, *ids]
        depth = np.full(tokens.shape, LAYERS)
        depth[0, len(prompt) : len(prompt) + len(ids) - 1] = depths[1:]
        kl_T, target_ET, hazard_TE = jax.device_get(whole(tokens, depth))
        for i in range(1, len(ids)):
            t = len(prompt) - 1 + i
            divergences.append(kl_T[t])
            for e, layer in enumerate(EXITS):
                if layer <= depths[i]:
                    decisions.append((layer, hazard_TE[t, e], target_ET[e, t]))
    return decisions, divergences


@pytest.mark.parametrize(
    "target", [pytest.param("teacher", marks=pytest.mark.slow), "student", "own"]
)
def test_reliability_of_a_model(split, recorded, target):
    student = split.decodable(split.trainable)
    made = hazard_calibration(
        "sample", student, split.decodable_teacher(split.trainable), EXITS, recorded, Sample(),
        sharpness=8.0, target=target,
    )  # fmt: skip
    decisions, divergences = by_hand(split, recorded, target, 8.0)
    assert np.mean(divergences) > 1e-3
    assert made.kl_student_teacher_nats == pytest.approx(np.mean(divergences), rel=1e-5)
    for entry in made.exits:
        here = [(h, t) for layer, h, t in decisions if layer == entry.exit]
        assert entry.positions == len(here)
        assert entry.hazard_mean == pytest.approx(np.mean([h for h, _ in here]), abs=1e-5)
        assert entry.target_mean == pytest.approx(np.mean([t for _, t in here]), abs=1e-5)
        assert sum(part.positions for part in entry.bins) == len(here)
    assert [entry.exit for entry in made.exits] == list(EXITS)
    by_exit = [[(h, t) for layer, h, t in decisions if layer == exit] for exit in EXITS]
    errors = [reliability(*map(np.asarray, zip(*here, strict=True)))[0] for here in by_exit]
    wanted = np.average(errors, weights=list(map(len, by_exit)))
    assert made.ece == pytest.approx(wanted, abs=1e-5)
    _, hazards, targets = map(np.asarray, zip(*decisions, strict=True))
    made_up = made.ece - reliability(hazards, targets)[0]  # for each other's errors, if pooled
    assert made_up > (1e-4 if target == "student" else -1e-5)


def test_the_same_over_data_shards(split, made):
    """Five completions do not divide over two shards."""
    student, recorded = split.decodable(split.trainable), recorded_of(made, range(5))
    wanted = hazards_of(student, recorded, Sample())
    with jax.set_mesh(make_mesh(data=2)):
        found = hazards_of(student, recorded, Sample())
    for row, tokens in zip(found, wanted, strict=True):
        np.testing.assert_allclose(
            np.asarray(row, float), np.asarray(tokens, float), atol=LOGPROBS, equal_nan=True
        )


def test_reliability_by_hand():
    hazards = np.asarray([0.05, 0.05, 0.32, 0.38, 1.0])
    targets = np.asarray([0.0, 0.2, 0.9, 0.7, 1.0])
    ece, bins = reliability(hazards, targets)
    # Bins 0, 3 and 9: |0.05 − 0.1|·2/5 + |0.35 − 0.8|·2/5 + 0.
    assert ece == pytest.approx(0.05 * 0.4 + 0.45 * 0.4)
    assert [(part.low, part.positions) for part in bins] == [(0.0, 2), (0.3, 2), (0.9, 1)]
    assert reliability(hazards, hazards)[0] == 0.0
    assert np.isnan(reliability(np.zeros(0), np.zeros(0))[0])
