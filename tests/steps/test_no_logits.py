"""No buffer of a compiled training step holds [tokens, vocabulary]: read from its module."""

import re

import jax
import optax
import pytest

from jexit.config import RLConfig, SFTConfig
from jexit.steps.completions import Completions
from jexit.steps.rl import Penalties, RLBatch, make_rl_step
from jexit.steps.sft import make_sft_step
from jexit.steps.state import new_state

VOCAB, WIDTH, ROWS, LENGTH, COMPLETION = 8_209, 16, 6, 24, 16


def shape(*dims, dtype="int32"):
    return jax.ShapeDtypeStruct(dims, dtype)


def completions() -> Completions:
    return Completions(*[shape(ROWS, LENGTH)] * 3, *[shape(ROWS, COMPLETION)] * 4)


def sft_text(make_split, config, **options) -> str:
    split, optimizer = make_split(vocab_size=VOCAB, **options), optax.adam(1e-3)
    step = make_sft_step(split, optimizer, config)
    state = new_state(split.trainable, optimizer)
    return step.lower(state, split.fixed, completions(), jax.random.key(0)).compile().as_text()


def rl_text(make_split, config, **options) -> str:
    split, optimizer = make_split(vocab_size=VOCAB, **options), optax.adam(1e-3)
    step = make_rl_step(split, optimizer, config)
    state = new_state(split.trainable, optimizer)
    floats = shape(ROWS, COMPLETION, dtype="float32")
    batch = RLBatch(
        completions(),
        shape(ROWS),
        shape(ROWS, COMPLETION),
        floats,
        floats,
        shape(ROWS, dtype="float32"),
        shape(ROWS, dtype="bool"),
    )
    lowered = step.lower(state, split.fixed, batch, Penalties(0.5, 0.0), jax.random.key(0))
    return lowered.compile().as_text()


def assert_no_logits(text: str) -> None:
    shapes = {
        tuple(map(int, dims.split(",")))
        for dims in re.findall(r"\b(?:f32|bf16|f16|pred|s32)\[([\d,]+)\]", text)
    }
    assert any(VOCAB in dims for dims in shapes), "the text names no head: it is not what it was"
    # The embedding, which is the head too, and what belongs to it: its gradient, its moments.
    wrong = {dims for dims in shapes if VOCAB in dims and dims not in {(VOCAB, WIDTH), (VOCAB,)}}
    wrong -= {(WIDTH, VOCAB), (1, VOCAB, WIDTH)}
    assert not wrong, f"buffers {sorted(wrong)}"


def test_calibration(make_split):
    for direction in ["student_teacher", "jeffreys"]:
        for target in ["teacher", "student"]:
            config = SFTConfig(samples=2, target=target, direction=direction)
            assert_no_logits(sft_text(make_split, config))


def test_calibration_of_the_whole_model(make_split):
    assert_no_logits(sft_text(make_split, SFTConfig(samples=2), full=True))


def test_reinforcement(make_split):
    for kl_loss in ["exact", "k2"]:
        config = RLConfig(rollouts=3, max_new_tokens=COMPLETION, kl_loss_coef=0.1, kl_loss=kl_loss)
        assert_no_logits(rl_text(make_split, config))


def test_reinforcement_of_the_whole_model(make_split):
    assert_no_logits(rl_text(make_split, RLConfig(rollouts=3, max_new_tokens=16), full=True))


def test_the_check_sees_logits_where_they_are():
    def loss(h_ND, head_VD):
        return jax.nn.logsumexp(h_ND @ head_VD.T, axis=-1).sum()

    arguments = shape(96, WIDTH, dtype="float32"), shape(VOCAB, WIDTH, dtype="float32")
    text = jax.jit(jax.grad(loss)).lower(*arguments).compile().as_text()
    with pytest.raises(AssertionError, match="buffers"):
        assert_no_logits(text)
