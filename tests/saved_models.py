"""Small models, and what tests of their directories compare and change."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jexit
from jexit.config import ExitSettings, LoRA
from jexit.model.transformer import Transformer
from jexit.presets import Architecture, Yarn

TOKENIZER = pathlib.Path(jexit.__file__).parent / "assets" / "tiny"
ADAPTER = LoRA(rank=2, alpha=6.0, dropout=0.1, targets=("q", "down"))
TRAINED = {"hazard_temperature": 0.4, "min_hazard": 0.2, "sharpness": 7.0, "target": "student"}
HEAD = ExitSettings(kind="mlp", norm="rms", bias=-1.5, **TRAINED)


def make_model(vocab_size, *, exits=(1, 2), head=HEAD, lora=ADAPTER, tied=True, layers=3):
    """A model in which no parameter is at its initial value."""
    arch = Architecture(
        family="qwen3" if tied else "qwen2",
        vocab_size=vocab_size,
        width=8,
        layers=layers,
        query_heads=2,
        kv_heads=1,
        head_dim=4,
        mlp_width=12,
        rope_theta=5e6,
        rms_norm_eps=1e-5,
        tied=tied,
        max_positions=64,
        rope_scaling=Yarn(factor=2.0, original_max_positions=32),
    )
    abstract = nnx.eval_shape(
        lambda: Transformer(arch, exit_layers=exits, exit_head=head, lora=lora, rngs=nnx.Rngs(0))
    )
    # Drawn by NumPy: to compile jax's generators for every shape would take most of the time.
    graphdef, state = nnx.split(abstract)
    rng = np.random.default_rng(1)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), state)
    return nnx.merge(graphdef, state)


def parameters(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(path): np.asarray(leaf[...]) for path, leaf in flat}


def same_model(found, wanted):
    """Same parameters, bit for bit, under the same settings."""
    ours, theirs = parameters(found), parameters(wanted)
    return (
        ours.keys() == theirs.keys()
        and all(ours[k].dtype == theirs[k].dtype for k in ours)
        and all(np.array_equal(ours[k], theirs[k]) for k in ours)
        and settings(found) == settings(wanted)
    )


def settings(model):
    head = model.exit_head
    return model.arch, model.exit_layers, (head.kind, head.norm), model.lora


def is_trainable(path):
    return path.startswith("exits.") or path.endswith((".lora_a", ".lora_b"))


def edit(directory, **changes):
    file = directory / "jexit.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in values.items() if v != "gone"}))
