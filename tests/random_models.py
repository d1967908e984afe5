"""Small random models in jexit's own terms, with nothing left at a start that hides it."""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jexit.config import Execution, ExitSettings, LoRA
from jexit.model.transformer import Transformer
from jexit.presets import Architecture


def random_model(
    family: str = "qwen3",
    *,
    exit_layers: tuple[int, ...] = (1, 2, 4),
    exit_head: ExitSettings = ExitSettings(),
    lora: LoRA | None = None,
    dtype: jnp.dtype = jnp.float32,
    execution: Execution = Execution(),
    **sizes: Any,
) -> Transformer:
    """Grouped queries, exit heads that leave often and differ between tokens.

    A parameter's values depend on its path and shape alone: models that differ in their adapters
    share their base weights. Drawn by NumPy: to compile jax's generators for every shape would take
    most of the time.
    """
    arch = Architecture(
        family=family,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        tied=family == "qwen3",
        max_positions=128,
        **{
            "vocab_size": 31,
            "width": 16,
            "layers": 5,
            "query_heads": 4,
            "kv_heads": 2,
            "head_dim": 6,
            "mlp_width": 24,
        }
        | sizes,
    )

    def build() -> Transformer:
        return Transformer(
            arch,
            exit_layers=exit_layers,
            exit_head=exit_head,
            lora=lora,
            dtype=dtype,
            execution=execution,
            rngs=nnx.Rngs(0),
        )

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        *_, name = names = [str(key.key) for key in path if hasattr(key, "key")]
        noise = np.random.default_rng(zlib.crc32(".".join(names).encode())).normal(size=leaf.shape)
        if name == "b2":
            value = np.linspace(-0.5, 0.5, len(exit_layers))
        elif name == "scale":
            value = 1.0 + 0.3 * noise
        elif name in ("kernel", "lora_a", "w1") and leaf.ndim > 2:
            outputs = 2 if names[-2] in ("q", "k", "v") and name == "kernel" else 1
            value = noise / math.sqrt(math.prod(leaf.shape[1 : leaf.ndim - outputs]))
        else:
            value = 0.5 * noise
        return jnp.asarray(value, leaf.dtype)

    graphdef, state = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))
