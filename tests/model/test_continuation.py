"""The linear continuation: h ← h + h · A_m + b_m in every layer that a token skips."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saved_models
from flax import nnx
from random_models import random_model

import jexit
from convert import to_hf
from jexit.config import ExitSettings
from jexit.data.tokenizer import Tokenizer
from jexit.io.hf_config import architecture_of_config
from jexit.io.model_dir import load, save_model
from jexit.model.exits import maps_to_end
from jexit.model.transformer import exit_hidden_states, run
from jexit.rollout import EngineSize, rollout
from tolerances import LOGITS

LAYERS, EXITS = 5, (1, 2, 4)
LINEAR = ExitSettings(continuation="linear")
FACTORED = ExitSettings(continuation="linear", continuation_rank=3)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(saved_models.TOKENIZER)


@pytest.fixture(scope="module", params=[LINEAR, FACTORED], ids=["full", "rank 3"])
def linear(request):
    return random_model(exit_head=request.param)


def continuation_of(model):
    """(A [L, D, D], b [L, D]) in float64, factors multiplied out."""
    part = model.blocks.continuation
    update_LXD = np.asarray(part.update.kernel[...], np.float64)
    if part.reduce is not None:
        update_LXD = np.asarray(part.reduce.kernel[...], np.float64) @ update_LXD
    return update_LXD, np.asarray(part.update.bias[...], np.float64)


def at_start(model):
    """The same model with a continuation as it is before it learns anything."""
    graphdef, state = nnx.split(model)

    def fresh(path, leaf):
        names = [str(key.key) for key in path if hasattr(key, "key")]
        return jnp.zeros_like(leaf) if "update" in names else leaf

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fresh, state))


def test_at_its_start_it_is_the_frozen_form_bit_for_bit(tokens_BT):
    for dtype, settings in ((jnp.float32, LINEAR), (jnp.bfloat16, FACTORED)):
        frozen = random_model(dtype=dtype)
        fresh = at_start(random_model(exit_head=settings, dtype=dtype))
        a, b = (
            jexit.forward(model, tokens_BT, policy=jexit.Sample(), key=jax.random.key(0))
            for model in (frozen, fresh)
        )
        assert np.array_equal(a.logits_BTV, b.logits_BTV)
        assert np.array_equal(a.depth_BT, b.depth_BT) and (a.depth_BT < LAYERS).any()
        assert np.array_equal(a.hazard_logits_BTE, b.hazard_logits_BTE)


@pytest.mark.parametrize(
    "settings", [LINEAR, pytest.param(FACTORED, marks=pytest.mark.slow)], ids=["full", "rank 3"]
)
@pytest.mark.parametrize("temperature", [1.0, 0.0], ids=["sampled", "greedy"])
def test_at_its_start_it_decodes_what_the_frozen_form_does_bit_for_bit(settings, temperature):
    """In the engine, whose layers are run by code of their own."""
    frozen, fresh = random_model(), at_start(random_model(exit_head=settings))
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    made, other = (
        rollout(
            model, prompts, size=EngineSize(rows=2, tick_rows=2), policy=jexit.Sample(),
            max_new_tokens=10, eos_ids=(), pad_id=0, key=0, temperature=temperature, hazards=True,
        )
        for model in (frozen, fresh)
    )  # fmt: skip
    assert len(np.unique(made.depths_BT)) > 2
    for name in ("tokens_BT", "depths_BT", "logprobs_BT", "depth_logprobs_BT", "hazard_logits_BTE"):
        np.testing.assert_array_equal(getattr(made, name), getattr(other, name), name)


def test_full_depth_does_not_know_it(model, linear, tokens_BT):
    full = jexit.forward(model, tokens_BT).logits_BTV
    assert np.array_equal(jexit.forward(linear, tokens_BT).logits_BTV, full)


def one_layer(model, layer):
    graphdef, state = nnx.split(model.blocks)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[layer], state))


def test_a_skipped_layer_moves_the_residual_linearly(linear, tokens_BT):
    """Everybody leaves at one exit: hidden state, keys and values from the chain, by hand.

    What the exit says, from the maps multiplied out beforehand, is the end of that chain.
    """
    a_LDD, b_LD = continuation_of(linear)
    run_to = nnx.jit(
        lambda model, depth_BT: run(
            model, tokens_BT, policy=jexit.Prescribed(depth_BT), keys_values=True
        )
    )
    full = nnx.jit(lambda model: run(model, tokens_BT, residual_layers=model.exit_layers))(linear)
    said_EBTD = exit_hidden_states(linear, full.residual_RBTD, linear.blocks.continuation)
    q_EDD, c_ED = maps_to_end(linear.blocks.continuation, EXITS, LAYERS)
    for index, depth in enumerate(EXITS):
        out = run_to(linear, jnp.full(tokens_BT.shape, depth))
        first_BTD = np.asarray(full.residual_RBTD[index], np.float64)
        h_BTD = first_BTD
        for layer in range(depth, LAYERS):
            block = one_layer(linear, layer)
            values = block.attn.v(block.attn_norm(jnp.asarray(h_BTD, jnp.float32)))
            np.testing.assert_allclose(out.keys_values.values[layer], values, atol=2e-4)
            h_BTD = h_BTD + h_BTD @ a_LDD[layer] + b_LD[layer]
        hidden = linear.final_norm(jnp.asarray(h_BTD, jnp.float32))
        np.testing.assert_allclose(out.hidden_BTD, hidden, atol=2e-4)
        np.testing.assert_allclose(said_EBTD[index], hidden, atol=2e-4)
        mapped_BTD = first_BTD + first_BTD @ np.asarray(q_EDD[index]) + np.asarray(c_ED[index])
        np.testing.assert_allclose(mapped_BTD, h_BTD, atol=1e-4 * np.abs(h_BTD).max())


def test_equals_a_loop_over_the_layers_of_hugging_face(tmp_path, tokens_BT):
    torch, hf_models = pytest.importorskip("torch"), pytest.importorskip("hf_models")
    theirs = hf_models.make_model("qwen2", num_hidden_layers=LAYERS, tie_word_embeddings=True)
    hf_models.save(tmp_path, theirs)
    ours, _ = load(tmp_path, dtype="float32", exit_layers=EXITS, exit_head=LINEAR)
    assert ours.arch == architecture_of_config(theirs.config.to_dict())
    rng = np.random.default_rng(0)
    part = ours.blocks.continuation.update
    part.kernel[...] = jnp.asarray(0.1 * rng.normal(size=part.kernel[...].shape), jnp.float32)
    part.bias[...] = jnp.asarray(0.2 * rng.normal(size=part.bias[...].shape), jnp.float32)
    maps = tuple(torch.tensor(np.asarray(p[...])) for p in (part.kernel, part.bias))
    depth_BT = rng.choice([*EXITS, LAYERS], tokens_BT.shape)
    with torch.no_grad():
        truth = hf_models.freeze_by_hand(theirs, tokens_BT, depth_BT, continuation=maps).numpy()
    out = jexit.forward(ours, tokens_BT, policy=jexit.Prescribed(depth_BT))
    np.testing.assert_allclose(out.logits_BTV, truth, atol=LOGITS)


@pytest.mark.parametrize("settings", [LINEAR, FACTORED], ids=["full", "rank 3"])
def test_a_directory_keeps_it(settings, tmp_path, tokenizer):
    linear = saved_models.make_model(tokenizer.vocab_size, head=settings)
    save_model(tmp_path, linear, tokenizer)
    again, _ = load(tmp_path, dtype="float32")
    assert again.exit_head == settings and saved_models.same_model(again, linear)
    with pytest.raises(ValueError, match=r"has exits\.continuation=linear; set"):
        load(tmp_path, exit_head=ExitSettings())


@pytest.mark.parametrize(
    "settings", [LINEAR, pytest.param(FACTORED, marks=pytest.mark.slow)], ids=["full", "rank 3"]
)
def test_a_directory_that_gains_it_exports_the_same(settings, tmp_path, tokenizer):
    """Bit for bit, but for the continuation's own arrays."""
    save_model(tmp_path / "frozen", saved_models.make_model(tokenizer.vocab_size), tokenizer)
    gained = dataclasses.replace(
        saved_models.HEAD,
        continuation=settings.continuation,
        continuation_rank=settings.continuation_rank,
    )
    fresh, _ = load(tmp_path / "frozen", dtype="float32", exit_head=gained)
    save_model(tmp_path / "linear", fresh, tokenizer)
    frozen, linear = (load(tmp_path / name, dtype="float32")[0] for name in ("frozen", "linear"))
    ours, theirs = (saved_models.parameters(model) for model in (linear, frozen))
    assert {name for name in ours if "continuation" not in name} == theirs.keys() < ours.keys()
    assert all(np.array_equal(ours[name], array) for name, array in theirs.items())
    for model in ("frozen", "linear"):
        target = tmp_path / f"{model}-hf"
        assert to_hf.main([f"--source={tmp_path / model}", f"--target={target}"]) == 0
    files = sorted(path.name for path in (tmp_path / "frozen-hf").iterdir())
    assert "model.safetensors" in files
    for name in files:
        if not name.startswith("exit_heads"):
            one, other = (tmp_path / f"{model}-hf" / name for model in ("frozen", "linear"))
            assert one.read_bytes() == other.read_bytes(), name


def test_a_rank_that_is_not_below_the_width_is_refused():
    with pytest.raises(
        ValueError, match=r"exits\.continuation_rank is 16, but it must be smaller than"
    ):
        random_model(exit_head=ExitSettings(continuation="linear", continuation_rank=16))


def test_one_of_another_number_of_layers_is_refused(tmp_path, tokenizer):
    for layers in (3, 4):
        model = saved_models.make_model(tokenizer.vocab_size, head=LINEAR, lora=None, layers=layers)
        save_model(tmp_path / str(layers), model, tokenizer)
    shutil.rmtree(tmp_path / "4" / "exits")
    shutil.copytree(tmp_path / "3" / "exits", tmp_path / "4" / "exits")
    with pytest.raises(ValueError, match=r"continuation\.update\.kernel \[3, 8, 8\] instead of "):
        load(tmp_path / "4")
