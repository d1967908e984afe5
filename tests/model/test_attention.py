"""Attention by name: flash attention against plain XLA, over a mesh too; who runs where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jexit
from jexit.config import Execution
from jexit.dist import make_mesh, use_mesh
from jexit.kernels.dispatch import compiling_for
from jexit.model import transformer
from jexit.model.attention import (
    BRANCHES,
    SPLASH_FROM,
    KeysValues,
    attend,
    check_attention,
    choose_attention,
)
from jexit.model.splash import block_size
from jexit.model.transformer import run
from tolerances import KERNEL, LOGITS, relative_error

# Rows of 5, 0 and 3 positions of padding.
PADDING = (5, 0, 3)


def inputs(length, heads, kv_heads, width, dtype=jnp.float32):
    shapes = [(3, length, count, width) for count in (heads, kv_heads, kv_heads, heads)]
    keys = jax.random.split(jax.random.key(length), 4)
    arrays = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
    return arrays[:3], arrays[3]


def valid(length, side):
    position_T, missing_B = jnp.arange(length), jnp.asarray(PADDING)[:, None]
    return position_T >= missing_B if side == "left" else position_T < length - missing_B


def outcome(arrays, weights, valid_BT, **options):
    """Attention at valid positions, and the gradients of a weighted sum of it."""

    def loss(q, k, v, weights, valid_BT):
        keep = 1.0 if valid_BT is None else valid_BT[..., None, None]
        mixed = attend(q, KeysValues(k, v), valid_BT, **options).astype(jnp.float32) * keep
        return jnp.sum(mixed * weights), mixed

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, mixed), gradients = gradient(*arrays, weights, valid_BT)
    return {"mixed": mixed} | dict(zip("qkv", gradients, strict=True))


def test_attention_is_the_softmax_average_of_the_values():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 3, heads, 6)) for heads in (4, 2, 2))
    mask = np.tril(np.ones((3, 3), bool))
    mask[:, 0] = False  # padding on the left
    truth = np.zeros((1, 3, 4, 6))
    for head in range(4):
        scores = q[0, :, head] @ k[0, :, head // 2].T / np.sqrt(6.0)
        weights = np.where(mask, np.exp(scores), 0.0)
        truth[0, 1:, head] = (weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30))[1:] @ (
            v[0, :, head // 2]
        )
    kv = KeysValues(jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32))
    found = attend(jnp.asarray(q, jnp.float32), kv, jnp.asarray([[False, True, True]]))
    np.testing.assert_allclose(found[:, 1:], truth[:, 1:], atol=1e-5)


SPLASH_CASES = [
    (150, 4, 2, 24, jnp.float32, None),  # heads as wide as the tiny preset's
    (40, 4, 1, 64, jnp.float32, "right"),
    (150, 4, 4, 64, jnp.float32, "left"),
    (600, 2, 1, 128, jnp.float32, "left"),  # two blocks of 384
    (40, 2, 1, 24, jnp.bfloat16, "left"),
    (150, 4, 2, 64, jnp.bfloat16, "right"),
    (600, 4, 2, 128, jnp.bfloat16, "right"),
]


def test_splash_attention_is_attention():
    for length, heads, kv_heads, width, dtype, side in SPLASH_CASES:
        arrays, weights = inputs(length, heads, kv_heads, width, dtype)
        valid_BT = None if side is None else valid(length, side)
        truth = outcome([part.astype(jnp.float32) for part in arrays], weights, valid_BT)
        found = outcome(arrays, weights, valid_BT, implementation="splash", interpret=True)
        for name in truth:
            error = relative_error(found[name], truth[name])
            assert error < KERNEL[jnp.dtype(dtype).name], f"{name}: {error:.1e}"


def test_texts_that_share_a_row_are_as_good_as_alone():
    """Three texts of 9, 14 and 17 positions in one row of 45, the rest padding."""
    for implementation in ["xla", "splash"]:
        (q, k, v), _ = inputs(45, 4, 2, 16)
        lengths = (9, 14, 17)
        segment_BT = jnp.repeat(jnp.array([1, 2, 3, 0]), jnp.array([*lengths, 5]))[None].repeat(
            3, 0
        )
        options = {"implementation": implementation, "interpret": True}
        found = attend(q, KeysValues(k, v), segment_BT=segment_BT, **options)
        start = 0
        for length in lengths:
            here = slice(start, start + length)
            alone = attend(q[:, here], KeysValues(k[:, here], v[:, here]))
            assert relative_error(found[:, here], alone) < KERNEL["float32"]
            start += length


def test_branches_of_a_trunk_are_as_good_as_alone():
    """Two trunks, of 6 and 5 positions, with branches of 4 and 7, and 9, 3 and 1; then padding."""
    (q, k, v), _ = inputs(45, 4, 2, 16)
    texts = {1: (6, (4, 7)), 2: (5, (9, 3, 1))}
    segments, alone = [], []
    for number, (trunk, branches) in texts.items():
        begin = len(segments)
        alone.append(range(begin, begin + trunk))
        segments += [number * BRANCHES] * trunk
        for branch, length in enumerate(branches, start=1):
            here = range(len(segments), len(segments) + length)
            alone.append([*range(begin, begin + trunk), *here])
            segments += [number * BRANCHES + branch] * length
    segment_BT = jnp.array([segments + [0] * (45 - len(segments))] * 3)
    found = attend(q, KeysValues(k, v), segment_BT=segment_BT, branches=True)
    for places in alone:
        at = jnp.array(places)
        expected = attend(q[:, at], KeysValues(k[:, at], v[:, at]))
        assert relative_error(found[:, at], expected) < KERNEL["float32"]


def test_splash_attention_refuses_branches():
    (q, k, v), _ = inputs(45, 4, 2, 16)
    segment_BT = jnp.ones((3, 45), jnp.int32)
    with pytest.raises(ValueError, match="no mask for texts that share a trunk; give each its own"):
        attend(
            q, KeysValues(k, v), segment_BT=segment_BT, branches=True, implementation="splash",
            interpret=True,
        )  # fmt: skip


def test_blocks_hold_every_length_with_little_padding():
    for length in range(1, 5000):
        block = block_size(length)
        assert block % 128 == 0 and block <= 512
        assert -length % block < 256


@pytest.mark.parametrize(
    ("sizes", "heads", "kv_heads", "rows"),
    [
        pytest.param((2, 2, 2), 4, 2, 4, id="everything divided"),
        pytest.param((1, 1, 8), 8, 2, 3, id="several devices share a key head"),
        pytest.param((1, 2, 2), 12, 3, 4, id="a device's heads straddle key heads"),
        pytest.param((2, 1, 4), 6, 2, 3, id="neither heads nor rows divide"),
    ],
)
def test_over_a_mesh_it_is_that_of_one_device(sizes, heads, kv_heads, rows):
    arrays, weights = inputs(20, heads, kv_heads, 16)
    *parts, weights, valid_BT = (
        jnp.concatenate([part, part[:1]])[:rows] for part in (*arrays, weights, valid(20, "right"))
    )
    options = {"implementation": "splash", "interpret": True}
    alone = outcome(parts, weights, valid_BT, **options)
    with use_mesh(make_mesh(*sizes)):
        spread = outcome(parts, weights, valid_BT, **options)
    for name in alone:
        assert relative_error(spread[name], alone[name]) < KERNEL["float32"], name


@pytest.mark.parametrize("remat", ["none", "block"])
def test_a_model_computes_the_same_with_it(make_model, remat, monkeypatch):
    interpreted = functools.partial(transformer.attend, interpret=True)
    monkeypatch.setattr(transformer, "attend", interpreted)
    tokens_BT = jax.random.randint(jax.random.key(0), (3, 21), 0, 31)
    depth_BT = jax.random.choice(jax.random.key(1), jnp.asarray([1, 2, 4, 5]), (3, 21))
    valid_BT = valid(21, "right")

    def hidden_and_gradients(execution):
        graphdef, state = nnx.split(make_model(execution=execution))

        def loss(state):
            model = nnx.merge(graphdef, state)
            out = run(model, tokens_BT, policy=jexit.Prescribed(depth_BT), valid_BT=valid_BT)
            hidden_BTD = out.hidden_BTD * valid_BT[..., None]
            return jnp.sum(jnp.sin(hidden_BTD)), hidden_BTD

        (_, hidden_BTD), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(state)
        return [hidden_BTD, *jax.tree.leaves(gradients)]

    truth = hidden_and_gradients(Execution(attention="xla"))
    found = hidden_and_gradients(Execution(attention="splash", remat=remat))
    for mine, theirs in zip(found, truth, strict=True):
        assert relative_error(mine, theirs) < LOGITS


# Who runs where


def test_a_platform_that_cannot_is_told_so_in_one_sentence(make_model):
    for name, needs in [("splash", "TPU"), ("cudnn", "GPU")]:
        message = (
            f"config.model.attention={name} needs a {needs}, found cpu; set config.model.attent"
        )
        with pytest.raises(ValueError, match=message):
            check_attention(name)
        with pytest.raises(ValueError, match=message):
            jexit.forward(make_model(execution=Execution(attention=name)), jnp.ones((1, 4), int))
        other = {"TPU": "gpu", "GPU": "tpu"}[needs]
        with compiling_for(other, "a chip"), pytest.raises(ValueError, match=f"found {other}"):
            check_attention(name)
        with compiling_for(needs.lower(), "a chip"):
            check_attention(name)


def test_an_unknown_name_is_refused():
    (q, k, v), _ = inputs(4, 2, 2, 8)
    with pytest.raises(ValueError, match="no implementation 'flash'; use auto, xla, cudnn or spl"):
        attend(q, KeysValues(k, v), implementation="flash")


def test_cudnn_is_refused_for_float32():
    (q, k, v), _ = inputs(4, 2, 2, 8)
    with compiling_for("gpu", "a chip"), pytest.raises(ValueError, match="found float32; set"):
        attend(q, KeysValues(k, v), implementation="cudnn")


def test_auto_takes_the_kernel_for_long_sequences_on_tpus_alone():
    for platform, length, name in [
        ("tpu", SPLASH_FROM, "splash"),
        ("tpu", SPLASH_FROM - 1, "xla"),
        ("gpu", 1 << 16, "xla"),
        ("cpu", 1 << 16, "xla"),
    ]:
        with compiling_for(platform, "a chip"):
            assert choose_attention("auto", length) == name
            assert choose_attention("xla", length) == "xla"
