"""Attention by name: flash attention against plain XLA, over a mesh too; who runs where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import random_model

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


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "width", "dtype", "side"),
    [
        (40, 4, 2, 24, "bfloat16", "left"),  # heads as wide as the tiny preset's
        (600, 2, 1, 128, "float32", "right"),  # two blocks of 384
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (150, 4, 2, 24, "float32", None),
                (40, 4, 1, 64, "float32", "right"),
                (150, 4, 4, 64, "float32", "left"),
                (600, 4, 2, 128, "bfloat16", "right"),
            )
        ),
    ],
)
def test_splash_attention_is_attention(length, heads, kv_heads, width, dtype, side):
    arrays, weights = inputs(length, heads, kv_heads, width, dtype)
    valid_BT = None if side is None else valid(length, side)
    truth = outcome([part.astype(jnp.float32) for part in arrays], weights, valid_BT)
    found = outcome(arrays, weights, valid_BT, implementation="splash", interpret=True)
    for name in truth:
        error = relative_error(found[name], truth[name])
        assert error < KERNEL[dtype], f"{name}: {error:.1e}"


def check_by_hand(found, texts, q, k, v):
    """Against soft-max averages in float64, where a position sees those of its texts up to it."""
    seen_TT = np.zeros((q.shape[1], q.shape[1]), bool)
    for places in texts:
        seen_TT[np.ix_(places, places)] = np.tril(np.ones((len(places), len(places)), bool))
    k, v = (np.repeat(np.float64(part), q.shape[2] // k.shape[2], axis=2) for part in (k, v))
    scores = np.einsum("BTNH,BSNH->BNTS", np.float64(q), k) / np.sqrt(q.shape[-1])
    weights = np.where(seen_TT, np.exp(scores), 0.0)
    held = seen_TT.any(1)
    weights = weights[:, :, held] / weights[:, :, held].sum(-1, keepdims=True)
    truth = np.einsum("BNTS,BSNH->BTNH", weights, v)
    assert relative_error(found[:, held], truth) < KERNEL["float32"]


@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_texts_that_share_a_row_do_not_see_each_other(implementation):
    """Three texts of 9, 14 and 17 positions in one row of 45, the rest padding."""
    (q, k, v), _ = inputs(45, 4, 2, 16)
    segment_BT = jnp.repeat(jnp.array([1, 2, 3, 0]), jnp.array([9, 14, 17, 5]))[None].repeat(3, 0)
    options = {"implementation": implementation, "interpret": True}
    found = attend(q, KeysValues(k, v), segment_BT=segment_BT, **options)
    check_by_hand(found, [range(9), range(9, 23), range(23, 40)], q, k, v)


def test_branches_see_their_trunk_and_not_each_other():
    """Two trunks, of 6 and 5 positions, with branches of 4 and 7, and 9 and 3; then padding."""
    (q, k, v), _ = inputs(45, 4, 2, 16)
    segments, texts = [], []
    for number, (trunk, branches) in {1: (6, (4, 7)), 2: (5, (9, 3))}.items():
        begin = len(segments)
        segments += [number * BRANCHES] * trunk
        for branch, length in enumerate(branches, start=1):
            here = range(len(segments), len(segments) + length)
            texts.append([*range(begin, begin + trunk), *here])
            segments += [number * BRANCHES + branch] * length
    segment_BT = jnp.array([segments + [0] * (45 - len(segments))] * 3)
    found = attend(q, KeysValues(k, v), segment_BT=segment_BT, branches=True)
    check_by_hand(found, texts, q, k, v)
    with pytest.raises(ValueError, match="not support texts that share a prefix; give each text"):
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
        pytest.param((1, 2, 2), 12, 3, 4, id="a device's heads straddle key heads"),
        *(
            pytest.param(*case, id=name, marks=pytest.mark.slow)
            for name, case in (
                ("everything divided", ((2, 2, 2), 4, 2, 4)),
                ("several devices share a key head", ((1, 1, 8), 8, 2, 3)),
                ("neither heads nor rows divide", ((2, 1, 4), 6, 2, 3)),
            )
        ),
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


def test_a_model_computes_the_same_with_it(monkeypatch):
    """Rematerialised."""
    interpreted = functools.partial(transformer.attend, interpret=True)
    monkeypatch.setattr(transformer, "attend", interpreted)
    tokens_BT = jax.random.randint(jax.random.key(0), (3, 21), 0, 31)
    depth_BT = jax.random.choice(jax.random.key(1), jnp.asarray([1, 2, 4, 5]), (3, 21))
    valid_BT = valid(21, "right")

    def hidden_and_gradients(execution):
        graphdef, state = nnx.split(random_model(execution=execution))

        def loss(state):
            model = nnx.merge(graphdef, state)
            out = run(model, tokens_BT, policy=jexit.Prescribed(depth_BT), valid_BT=valid_BT)
            hidden_BTD = out.hidden_BTD * valid_BT[..., None]
            return jnp.sum(jnp.sin(hidden_BTD)), hidden_BTD

        (_, hidden_BTD), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(state)
        return [hidden_BTD, *jax.tree.leaves(gradients)]

    truth = hidden_and_gradients(Execution(attention="xla"))
    found = hidden_and_gradients(Execution(attention="splash", remat="block"))
    for mine, theirs in zip(found, truth, strict=True):
        assert relative_error(mine, theirs) < LOGITS


def test_what_a_platform_cannot_compute_is_refused_in_one_sentence():
    for name, needs in (("splash", "TPU"), ("cudnn", "GPU")):
        message = (
            f"config.model.attention={name} needs a {needs}, but the platform is cpu; set config.mo"
        )
        with pytest.raises(ValueError, match=message):
            jexit.forward(random_model(execution=Execution(attention=name)), jnp.ones((1, 4), int))
        other = {"TPU": "gpu", "GPU": "tpu"}[needs]
        with compiling_for(other, "a chip"), pytest.raises(ValueError, match=f"form is {other}"):
            check_attention(name)
        with compiling_for(needs.lower(), "a chip"):
            check_attention(name)
    (q, k, v), _ = inputs(4, 2, 2, 8)
    with pytest.raises(ValueError, match="no implementation 'flash'; use auto, xla, cudnn or spl"):
        attend(q, KeysValues(k, v), implementation="flash")
    with compiling_for("gpu", "a chip"), pytest.raises(ValueError, match="is float32; set"):
        attend(q, KeysValues(k, v), implementation="cudnn")


def test_auto_takes_the_kernel_for_long_sequences_on_tpus_alone():
    for platform, length, name in (
        ("tpu", SPLASH_FROM, "splash"),
        ("tpu", SPLASH_FROM - 1, "xla"),
        ("gpu", 1 << 16, "xla"),
        ("cpu", 1 << 16, "xla"),
    ):
        with compiling_for(platform, "a chip"):
            assert choose_attention("auto", length) == name
            assert choose_attention("xla", length) == "xla"
