"""No buffer of a compiled training step holds [tokens, vocabulary]: read from its module."""

import re

import jax
import optax
import pytest
from steps import toy

from jexit.config import RLConfig, SFTConfig
from jexit.steps.completions import Completions
from jexit.steps.rl import Penalties, RLBatch, make_rl_step
from jexit.steps.sft import make_sft_step

VOCAB, WIDTH, ROWS, LENGTH, COMPLETION = 8_209, 16, 6, 24, 16


def shape(*dims, dtype="int32"):
    return jax.ShapeDtypeStruct(dims, dtype)


def completions() -> Completions:
    return Completions(*[shape(ROWS, LENGTH)] * 3, *[shape(ROWS, COMPLETION)] * 4)


def rl_batch() -> RLBatch:
    return RLBatch(
        completions(),
        shape(ROWS),
        shape(ROWS, COMPLETION),
        *[shape(ROWS, COMPLETION, dtype="float32")] * 2,
        shape(ROWS, dtype="float32"),
        shape(ROWS, dtype="bool"),
    )


def text_of(make_step, full, config, *arguments) -> str:
    split, optimizer = toy.make_split(vocab_size=VOCAB, full=full), optax.adam(1e-3)
    step, state = make_step(split, optimizer, config), toy.start(split, optimizer)
    return step.lower(state, split.fixed, *arguments, jax.random.key(0)).compile().as_text()


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


LORA_AND_FULL = pytest.mark.parametrize(
    "full", [pytest.param(False, id="lora", marks=pytest.mark.slow), pytest.param(True, id="full")]
)


@LORA_AND_FULL
def test_calibration(full):
    config = SFTConfig(samples=2)
    if not full:
        config = SFTConfig(samples=2, target="student", direction="jeffreys")
    assert_no_logits(text_of(make_sft_step, full, config, completions()))


@LORA_AND_FULL
def test_reinforcement(full):
    kl_loss = "k2" if full else "exact"
    config = RLConfig(rollouts=3, max_new_tokens=COMPLETION, kl_loss_coef=0.1, kl_loss=kl_loss)
    assert_no_logits(text_of(make_rl_step, full, config, rl_batch(), Penalties(0.5, 0.0)))


def test_the_check_sees_logits_where_they_are():
    def loss(h_ND, head_VD):
        return jax.nn.logsumexp(h_ND @ head_VD.T, axis=-1).sum()

    arguments = shape(96, WIDTH, dtype="float32"), shape(VOCAB, WIDTH, dtype="float32")
    text = jax.jit(jax.grad(loss)).lower(*arguments).compile().as_text()
    with pytest.raises(AssertionError, match="buffers"):
        assert_no_logits(text)
