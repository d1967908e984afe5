"""The linear continuation: h ← h + h · A_m + b_m in every layer that a token skips."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saved_models
import torch
from flax import nnx
from transformers import Qwen2Config, Qwen2ForCausalLM

import hf_models
import jexit
from convert import to_hf
from jexit.config import ExitSettings
from jexit.data.tokenizer import Tokenizer
from jexit.io.model_dir import load, save_model
from jexit.model.exits import ContinuationParam, maps_to_end
from jexit.model.transformer import exit_hidden_states, logits_of, run
from tolerances import LOGITS

LAYERS, EXITS = 5, (1, 2, 4)
LINEAR = ExitSettings(continuation="linear")
FACTORED = ExitSettings(continuation="linear", continuation_rank=3)


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


@pytest.fixture(scope="module")
def tokens_BT():
    return jnp.asarray(np.random.default_rng(0).integers(0, 31, (3, 8)))


@pytest.fixture(scope="module", params=[LINEAR, FACTORED], ids=["full", "rank 3"])
def linear(make_model, request):
    return make_model(exit_head=request.param)


def test_at_its_start_it_is_the_frozen_form_bit_for_bit(make_model, tokens_BT):
    for dtype in [jnp.float32, jnp.bfloat16]:
        for settings in [LINEAR, FACTORED]:
            frozen = make_model(dtype=dtype)
            fresh = at_start(make_model(exit_head=settings, dtype=dtype))
            for policy in (jexit.Full(), jexit.Sample(), jexit.Threshold(0.5)):
                a, b = (
                    jexit.forward(model, tokens_BT, policy=policy, key=jax.random.key(0))
                    for model in (frozen, fresh)
                )
                assert np.array_equal(a.logits_BTV, b.logits_BTV)
                assert np.array_equal(a.depth_BT, b.depth_BT)
                assert np.array_equal(a.hazard_logits_BTE, b.hazard_logits_BTE)


def test_full_depth_does_not_know_it(make_model, linear, tokens_BT):
    full = jexit.forward(make_model(), tokens_BT).logits_BTV
    assert np.array_equal(jexit.forward(linear, tokens_BT).logits_BTV, full)


def test_a_skipped_layer_moves_the_residual_linearly(linear, tokens_BT):
    """Everybody leaves at one exit: hidden state, keys and values from the chain, by hand."""
    a_LDD, b_LD = continuation_of(linear)
    for depth in EXITS:
        depth_BT = np.full(tokens_BT.shape, depth)
        out = run(linear, tokens_BT, policy=jexit.Prescribed(depth_BT), keys_values=True)
        h_BTD, kv = residual_at(linear, tokens_BT, depth), out.keys_values
        for layer in range(depth, LAYERS):
            block = one_layer(linear, layer)
            x_BTD = block.attn_norm(jnp.asarray(h_BTD, jnp.float32))
            values = block.attn.v(x_BTD)
            np.testing.assert_allclose(kv.values[layer], values, atol=2e-4)
            h_BTD = h_BTD + h_BTD @ a_LDD[layer] + b_LD[layer]
        hidden = linear.final_norm(jnp.asarray(h_BTD, jnp.float32))
        np.testing.assert_allclose(out.hidden_BTD, hidden, atol=2e-4)


def residual_at(model, tokens_BT, layer):
    """The residual [B, T, D] that enters an exit's layer at full depth, in float64."""
    residual_EBTD = run(model, tokens_BT, exit_residual=True).exit_residual_EBTD
    return np.asarray(residual_EBTD[EXITS.index(layer)], np.float64)


def one_layer(model, layer):
    graphdef, state = nnx.split(model.blocks)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[layer], state))


def test_what_an_exit_says_is_the_end_of_the_chain(linear, tokens_BT):
    """The maps multiplied out beforehand, against everybody leaving there."""
    residual_EBTD = run(linear, tokens_BT, exit_residual=True).exit_residual_EBTD
    hidden_EBTD = exit_hidden_states(linear, residual_EBTD, linear.blocks.continuation)
    for index, depth in enumerate(EXITS):
        depth_BT = np.full(tokens_BT.shape, depth)
        out = run(linear, tokens_BT, policy=jexit.Prescribed(depth_BT))
        np.testing.assert_allclose(hidden_EBTD[index], out.hidden_BTD, atol=2e-4)


def test_maps_to_the_end_are_the_product_of_the_layers(linear):
    a_LDD, b_LD = continuation_of(linear)
    q_EDD, c_ED = maps_to_end(linear.blocks.continuation, EXITS, LAYERS)
    for index, depth in enumerate(EXITS):
        whole_DD, bias_D = np.eye(a_LDD.shape[1]), np.zeros(a_LDD.shape[1])
        for layer in range(depth, LAYERS):
            step_DD = np.eye(a_LDD.shape[1]) + a_LDD[layer]
            whole_DD, bias_D = whole_DD @ step_DD, bias_D @ step_DD + b_LD[layer]
        np.testing.assert_allclose(q_EDD[index], whole_DD - np.eye(len(whole_DD)), atol=1e-4)
        np.testing.assert_allclose(c_ED[index], bias_D, atol=1e-4)


def test_gradient_against_central_differences(linear, tokens_BT):
    """Of the logits of tokens that leave and of what the exits say, to every parameter of it."""
    graphdef, moving, rest = nnx.split(linear, ContinuationParam, ...)
    depth_BT = np.random.default_rng(0).choice([*EXITS, LAYERS], tokens_BT.shape)

    @jax.jit
    def loss(moving):
        model = nnx.merge(graphdef, moving, rest)
        out = run(model, tokens_BT, policy=jexit.Prescribed(depth_BT), exit_residual=True)
        said_EBTD = exit_hidden_states(model, out.exit_residual_EBTD, model.blocks.continuation)
        logp = jax.nn.log_softmax(logits_of(out.hidden_BTD, model.head_VD))
        return jnp.mean(logp[..., 3]) + jnp.mean(jnp.tanh(said_EBTD[..., ::2]))

    gradient = jax.grad(loss)(moving)
    for path, leaf in nnx.to_flat_state(gradient):
        assert float(jnp.abs(leaf[...]).max()) > 1e-5, path
    rng, step = np.random.default_rng(1), 1e-3

    def moved(way, by):
        return loss(jax.tree.map(lambda leaf, along: leaf + by * along, moving, way))

    for _ in range(4):
        way = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), moving
        )
        difference = (moved(way, step) - moved(way, -step)) / (2 * step)
        along = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, way)))
        assert float(along) == pytest.approx(float(difference), rel=1e-2, abs=5e-4)


def test_equals_a_loop_over_the_layers_of_hugging_face(tmp_path, tokens_BT):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=hf_models.VOCABULARY, hidden_size=16, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    theirs = Qwen2ForCausalLM(config).eval()
    hf_models.save(tmp_path, theirs)
    ours, _ = load(tmp_path, dtype="float32", exit_layers=EXITS, exit_head=LINEAR)
    rng = np.random.default_rng(0)
    part = ours.blocks.continuation.update
    part.kernel[...] = jnp.asarray(0.2 * rng.normal(size=part.kernel[...].shape), jnp.float32)
    part.bias[...] = jnp.asarray(0.2 * rng.normal(size=part.bias[...].shape), jnp.float32)
    a_LDD, b_LD = (torch.tensor(np.asarray(p[...])) for p in (part.kernel, part.bias))
    depth_BT = rng.choice([*EXITS, LAYERS], tokens_BT.shape)

    with torch.no_grad():
        truth = hf_models.freeze_by_hand(
            theirs, tokens_BT, depth_BT, continuation=(a_LDD, b_LD)
        ).numpy()
    out = jexit.forward(ours, tokens_BT, policy=jexit.Prescribed(depth_BT))
    np.testing.assert_allclose(out.logits_BTV, truth, atol=LOGITS)


@pytest.mark.parametrize("settings", [LINEAR, FACTORED], ids=["full", "rank 3"])
def test_a_directory_keeps_it_and_may_gain_it(settings, tmp_path):
    tokenizer = Tokenizer.load(saved_models.TOKENIZER)
    frozen, linear = (
        saved_models.make_model(tokenizer.vocab_size, head=head)
        for head in (ExitSettings(), settings)
    )
    save_model(tmp_path / "linear", linear, tokenizer)
    again, _ = load(tmp_path / "linear", dtype="float32")
    assert again.exit_head == settings and saved_models.same_model(again, linear)
    with pytest.raises(ValueError, match=r"has exits\.continuation=linear, not frozen"):
        load(tmp_path / "linear", exit_head=ExitSettings())

    save_model(tmp_path / "frozen", frozen, tokenizer)
    fresh, _ = load(tmp_path / "frozen", dtype="float32", exit_head=settings)
    assert fresh.exit_head.continuation == "linear"
    tokens_BT = np.ones((1, 5), np.int32)
    policy = jexit.Prescribed(np.full(tokens_BT.shape, 1))
    truth, found = (jexit.forward(model, tokens_BT, policy=policy) for model in (frozen, fresh))
    assert np.array_equal(found.logits_BTV, truth.logits_BTV)


@pytest.mark.parametrize("settings", [LINEAR, FACTORED], ids=["full", "rank 3"])
def test_at_its_start_text_directory_and_export_are_the_frozen_forms(settings, tmp_path):
    """Bit for bit, but for the continuation's own arrays."""
    tokenizer = Tokenizer.load(saved_models.TOKENIZER)
    save_model(tmp_path / "frozen", saved_models.make_model(tokenizer.vocab_size), tokenizer)
    fresh, _ = load(
        tmp_path / "frozen", dtype="float32",
        exit_head=dataclasses.replace(saved_models.HEAD, **settings_of(settings)),
    )  # fmt: skip
    save_model(tmp_path / "linear", fresh, tokenizer)
    frozen, linear = (load(tmp_path / name, dtype="float32")[0] for name in ("frozen", "linear"))

    prompts = ["3+4=", "17+25+3="] * 3
    for policy, temperature in (
        (jexit.Threshold(0.2), 0.0), (jexit.Sample(), 1.0), (jexit.Full(), 0.0)
    ):  # fmt: skip
        made = [
            jexit.generate(model, tokenizer, prompts, policy=policy, temperature=temperature,
                           max_new_tokens=12, seed=3)
            for model in (frozen, linear)
        ]  # fmt: skip
        for name in ("texts", "tokens", "depths"):
            assert getattr(made[0], name) == getattr(made[1], name)
        for ours, theirs in zip(made[0].logprobs, made[1].logprobs, strict=True):
            assert np.array_equal(ours, theirs)
        if not isinstance(policy, jexit.Full):
            assert min(map(min, made[0].depths)) < frozen.arch.layers

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


def settings_of(settings):
    return {name: getattr(settings, name) for name in ("continuation", "continuation_rank")}


MEANINGLESS = [
    ({"continuation": "quadratic"}, "continuation is 'quadratic'; choose one of frozen, linear"),
    ({"continuation_rank": 4}, "continuation_rank is 4 for a frozen continuation"),
    (
        {"continuation": "linear", "continuation_rank": -1},
        "continuation_rank is -1; it must be at least 0",
    ),
]


def test_settings_that_mean_nothing_are_refused():
    for settings, sentence in MEANINGLESS:
        with pytest.raises(ValueError, match=sentence):
            ExitSettings(**settings)


def test_a_rank_over_the_width_is_refused(make_model):
    with pytest.raises(ValueError, match="continuation_rank is 16 for a model of width 16; make"):
        make_model(exit_head=ExitSettings(continuation="linear", continuation_rank=16))


def test_one_of_another_number_of_layers_is_refused(tmp_path):
    tokenizer = Tokenizer.load(saved_models.TOKENIZER)
    for name, layers in (("three", 3), ("four", 4)):
        model = saved_models.make_model(tokenizer.vocab_size, head=LINEAR, lora=None, layers=layers)
        save_model(tmp_path / name, model, tokenizer)
        target = tmp_path / f"{name}-hf"
        assert to_hf.main([f"--source={tmp_path / name}", f"--target={target}"]) == 0
    shutil.rmtree(tmp_path / "four" / "exits")
    shutil.copytree(tmp_path / "three" / "exits", tmp_path / "four" / "exits")
    with pytest.raises(ValueError, match=r"continuation\.update\.kernel \[3, 8, 8\] in place of "):
        load(tmp_path / "four")
    for file in (tmp_path / "three-hf").glob("exit_heads*"):
        shutil.copy(file, tmp_path / "four-hf")
    with pytest.raises(ValueError, match=r"missing continuation\.3\.update\.weight"):
        load(tmp_path / "four-hf")
