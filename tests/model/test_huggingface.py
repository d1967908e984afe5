"""The model against Hugging Face transformers, float32 on CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saved_models
from flax import nnx

import jexit
from convert import from_hf, names
from jexit.model.transformer import exit_hidden_states, logits_of, run
from tolerances import GRADIENT, LOGITS, LOGITS_REAL, relative_error

torch = pytest.importorskip("torch")
hf_models = pytest.importorskip("hf_models")

# One file of weights, or several, in turn.
CASES = {
    "qwen2-untied-own-head-dim-no-groups": ("qwen2", {"head_dim": 20, "num_key_value_heads": 4}),
    "qwen2-tied-yarn": (
        "qwen2",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "qwen3-untied-theta5e6": (
        "qwen3",
        {"head_dim": 20, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
    ),
    "qwen3-tied-one-kv-head-yarn": (
        "qwen3",
        {
            "tie_word_embeddings": True,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 3.0,
                "original_max_position_embeddings": 24,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "attention_factor": 1.3,
                "truncate": False,
            },
        },
    ),
    "llama-untied-theta5e5": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "llama-tied-llama3": (
        "llama",
        {
            "tie_word_embeddings": True,
            "head_dim": 12,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e3,
                "factor": 8.0,
                "low_freq_factor": 0.5,
                "high_freq_factor": 2.0,
                "original_max_position_embeddings": 24,
            },
        },
    ),
}
LENGTHS = (48, 1, 29)  # right-padded rows; the original contexts of scaled rope end at 16 and 24
EXITS = (1, 3)


# Of each family, and of each way to scale positions, the default has one.
SLOW = ("qwen3-tied-one-kv-head-yarn", "llama-untied-theta5e5")


PARAMS = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]


@pytest.fixture(scope="module", params=PARAMS)
def pair(request, tmp_path_factory):
    """Hugging Face's model, and jexit's from the converted directory; random exit heads."""
    family, overrides = CASES[request.param]
    theirs = hf_models.make_model(family, seed=len(request.param), **overrides)
    root = tmp_path_factory.mktemp("pair")
    sharded = [*CASES].index(request.param) % 2 == 1
    hf_models.save(root / "hf", theirs, **({"max_shard_size": "20KB"} if sharded else {}))
    assert (len(list((root / "hf").glob("model-*.safetensors"))) > 2) == sharded
    assert from_hf.main([f"--source={root / 'hf'}", f"--target={root / 'jexit'}"]) == 0
    ours, _ = jexit.load(root / "jexit", exit_layers=EXITS)
    noise = np.random.default_rng(0)
    nnx.update(
        ours.exits,
        jax.tree.map(
            lambda leaf: leaf + noise.normal(0.0, 0.3, leaf.shape).astype(np.float32),
            nnx.state(ours.exits),
        ),
    )
    return theirs, ours, root / "hf"


def valid(array):
    return np.concatenate(
        [np.asarray(row)[:length] for row, length in zip(array, LENGTHS, strict=True)]
    )


def test_full_and_prescribed_depths_equal_hugging_faces(pair):
    """Of padded batches, whose padding is ordinary tokens: it must not be looked at."""
    theirs, ours, _ = pair
    tokens_BT = hf_models.random_tokens(len(LENGTHS), max(LENGTHS))
    depth_BT = np.random.default_rng(0).choice((*EXITS, 4), tokens_BT.shape)
    with torch.no_grad():
        mask_BT = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
        tokens = torch.tensor(tokens_BT, dtype=torch.long)
        full = theirs(tokens, attention_mask=mask_BT.long()).logits
        # The hand-made loop over layers is Hugging Face's own at full depth.
        by_hand = hf_models.freeze_by_hand(theirs, tokens, depth_BT * 0 + 4, LENGTHS)
        residuals = hf_models.residuals_by_hand(theirs, tokens_BT, depth_BT, LENGTHS)
        frozen = theirs.lm_head(theirs.model.norm(residuals[-1]))
    assert np.abs(valid(by_hand) - valid(full)).max() <= LOGITS
    assert valid(full).std() > 1.0 and np.abs(valid(full) - valid(frozen)).mean() > 0.1
    found = jexit.forward(ours, tokens_BT, np.asarray(LENGTHS))
    assert np.abs(valid(found.logits_BTV) - valid(full)).max() <= LOGITS
    assert found.residual_LBTD is None
    policy = jexit.Prescribed(depth_BT)
    found = jexit.forward(ours, tokens_BT, np.asarray(LENGTHS), policy=policy, residuals=True)
    assert np.abs(valid(found.logits_BTV) - valid(frozen)).max() <= LOGITS
    assert len(found.residual_LBTD) == len(residuals) == 5
    for ours_BTD, theirs_BTD in zip(found.residual_LBTD, residuals, strict=True):
        assert relative_error(valid(ours_BTD), valid(theirs_BTD)) <= 1e-5
    # Hazards: each head on the residual that enters its layer, where the token is still alive.
    for index, layer in enumerate(EXITS):
        z = ours.exits(jnp.asarray(residuals[layer].numpy()), jnp.asarray(index))
        assert np.abs(valid(found.hazard_logits_BTE[..., index]) - valid(z)).max() <= LOGITS


def test_straight_from_the_hugging_face_directory_it_is_the_same_model(pair):
    _, ours, directory = pair
    straight, _ = jexit.load(directory, exit_layers=EXITS)
    assert straight.arch == ours.arch
    found, wanted = (saved_models.parameters(model) for model in (straight, ours))
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        if not name.startswith("exits."):
            np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def stacked(arch, tensors):
    """Hugging Face tensors by name as jexit's parameters by path, by the naming rules."""
    sizes = names.axis_sizes(**arch.to_dict())
    values = {}
    for rule in names.base_rules(arch.family, arch.tied):
        if rule.stacked:
            layers = (tensors[rule.name_at(i)].detach().numpy() for i in range(arch.layers))
            values[rule.path] = np.stack([rule.to_jexit(t, sizes) for t in layers])
        else:
            values[rule.path] = rule.to_jexit(tensors[rule.name].detach().numpy(), sizes)
    return values


@pytest.mark.parametrize(
    "pair", ["qwen2-tied-yarn", "qwen3-untied-theta5e6"], indirect=True
)  # Llama has neither the one's bias nor the other's norms
def test_gradients_and_logit_lens_equal_torchs(pair):
    """Under prescribed depths, through frozen keys and values too; lens: head on what enters ℓ."""
    theirs, ours, _ = pair
    tokens_BT = hf_models.random_tokens(2, 10, seed=3)
    depth_BT = np.random.default_rng(4).integers(1, 5, tokens_BT.shape)
    weights_BTV = np.random.default_rng(5).normal(size=(*tokens_BT.shape, hf_models.VOCABULARY))
    weights_BTV = weights_BTV.astype(np.float32)

    theirs.zero_grad()
    logits = hf_models.freeze_by_hand(theirs, tokens_BT, depth_BT)
    (logits * torch.tensor(weights_BTV)).sum().backward()
    truth = stacked(ours.arch, {name: p.grad for name, p in theirs.named_parameters()})
    with torch.no_grad():
        residuals = hf_models.residuals_by_hand(theirs, tokens_BT, np.full(tokens_BT.shape, 4))
        lens = [theirs.lm_head(theirs.model.norm(residuals[layer])).numpy() for layer in EXITS]

    graphdef, state = nnx.split(ours)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(state):
        model = nnx.merge(graphdef, state)
        out = run(model, jnp.asarray(tokens_BT), policy=jexit.Prescribed(jnp.asarray(depth_BT)))
        full = run(model, jnp.asarray(tokens_BT), residual_layers=model.exit_layers)
        hidden_EBTD = exit_hidden_states(model, full.residual_RBTD, None)
        loss = (logits_of(out.hidden_BTD, model.head_VD) * weights_BTV).sum()
        return loss, logits_of(hidden_EBTD, model.head_VD)

    gradients, lens_EBTV = gradient(state)
    assert np.abs(np.asarray(lens_EBTV) - np.stack(lens)).max() <= LOGITS
    found = {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(gradients)}
    for path, array in truth.items():
        assert relative_error(found[path], array) <= GRADIENT, path
        assert np.abs(array).max() > 1e-2, path


@pytest.mark.weights
def test_real_checkpoint_at_full_and_prescribed_depths(real_checkpoint):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(real_checkpoint, dtype=torch.float32).eval()
    ours, tokenizer = jexit.load(real_checkpoint, dtype="float32")
    prompts = [
        tokenizer.encode_prompt(text)
        for text in (
            "Natalia sold 48 clips in April and half as many in May. How many in all?",
            "Write a haiku about the sea.",
        )
    ]
    lengths_B = np.asarray([len(prompt) for prompt in prompts])
    tokens_BT = np.full((2, lengths_B.max()), tokenizer.pad_id)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    depths = (*ours.exit_layers, ours.arch.layers)
    depth_BT = np.random.default_rng(0).choice(depths, tokens_BT.shape)
    for policy, depths in (
        (jexit.Full(), np.full(tokens_BT.shape, ours.arch.layers)),
        (jexit.Prescribed(depth_BT), depth_BT),
    ):
        with torch.no_grad():
            truth = hf_models.freeze_by_hand(theirs, tokens_BT, depths, lengths_B).numpy()
            if isinstance(policy, jexit.Full):
                own = theirs(torch.tensor(tokens_BT[:1, : lengths_B[0]])).logits[0].numpy()
                assert np.abs(own - truth[0, : lengths_B[0]]).max() <= LOGITS_REAL
        found = jexit.forward(ours, tokens_BT, lengths_B, policy=policy).logits_BTV
        for row, length in enumerate(lengths_B):
            gap = np.abs(np.asarray(found[row, :length]) - truth[row, :length]).max()
            assert gap <= LOGITS_REAL
