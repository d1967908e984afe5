"""Decoding speed against google-tunix's sampler, on the same converted weights, as a ratio.

    python -m pip install google-tunix     # into an environment of its own, before jexit
    python tests/benchmarks/tunix_sampler.py [--batch 8] [--new-tokens 64]

A Qwen2 model of 4 layers and width 128 with random weights is written as Hugging Face safetensors
and read by both. Greedy, at full depth, float32 on the CPU, prefill included; nothing is compiled
while the clock runs. tunix attends to the whole of a cache whose size its caller gives: once as its
own command line gives it, 256 slots above what is needed, and once cut to what is needed.
Alternatives take turns; medians. Exits 1 when the tokens differ or jexit is under 1.5 times as fast
as the first.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable

import numpy as np

FASTER = 1.5
SPARE = 256  # slots
NO_TOKEN = -1  # an end token that never comes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from decode import in_turns

    from jexit.presets import Architecture

    arch = Architecture(
        family="qwen2", vocab_size=576, width=128, layers=4, query_heads=4, kv_heads=4,
        head_dim=32, mlp_width=512, rope_theta=1e6, rms_norm_eps=1e-6, tied=True,
        max_positions=1024,
    )  # fmt: skip
    shape = (arguments.batch, arguments.prompt_tokens)
    prompts = np.random.default_rng(0).integers(1, arch.vocab_size, shape).tolist()
    with tempfile.TemporaryDirectory() as folder:
        write_random(pathlib.Path(folder), arch)
        runs = {
            "jexit": with_jexit(folder, prompts, arguments.new_tokens),
            "tunix": with_tunix(folder, arch, prompts, arguments.new_tokens, SPARE),
            "tunix, cut": with_tunix(folder, arch, prompts, arguments.new_tokens, 0),
        }
    tokens = {name: run() for name, run in runs.items()}
    speeds = {
        name: arguments.batch * arguments.new_tokens / turns[:, 0]
        for name, turns in in_turns(runs, arguments.repeats).items()
    }
    print(
        f"batch {arguments.batch}, {arguments.new_tokens} new tokens after "
        f"{arguments.prompt_tokens}, {arch.layers} layers of width {arch.width}"
    )
    print(f"{'':<12}{'tokens/s':>10}{'jexit':>14}  tokens")
    good = True
    for name, speed in speeds.items():
        ratio = float(np.median(speeds["jexit"] / speed))
        same = np.array_equal(tokens["jexit"], tokens[name])
        good &= same and (name != "tunix" or ratio >= FASTER)
        print(
            f"{name:<12}{np.median(speed):>10,.0f}{ratio:>8.2f} times  "
            f"{'equal' if same else 'differ'}"
        )
    sys.exit(0 if good else 1)


def write_random(folder: pathlib.Path, arch: object) -> None:
    """A checkpoint as transformers writes it."""
    from flax import nnx

    from jexit.config import TINY_PATH
    from jexit.data.tokenizer import Tokenizer
    from jexit.io.files import write_json
    from jexit.io.hf_config import config_of_architecture
    from jexit.io.model_source import find_model
    from jexit.io.weights import base_part, write_safetensors
    from jexit.model.transformer import Transformer

    state = nnx.to_flat_state(
        nnx.state(Transformer(arch, exit_layers=(2,), rngs=nnx.Rngs(0)), nnx.Param)
    )
    params = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in state}
    base = {name: array for name, array in params.items() if not name.startswith("exits.")}
    dtypes = {name: array.dtype for name, array in base.items()}
    write_safetensors(folder, base_part(arch), dtypes, base.items())
    write_json(folder / "config.json", config_of_architecture(arch, dtype="float32"))
    Tokenizer.load(find_model(TINY_PATH)).save(folder)  # never used


def with_jexit(folder: str, prompts: list[list[int]], new: int) -> Callable[[], np.ndarray]:
    from flax import nnx

    from jexit.io.model_dir import load
    from jexit.rollout import rollout

    split = nnx.split(load(folder, dtype="float32")[0])
    settings = {"max_new_tokens": new, "temperature": 0.0, "eos_ids": (), "pad_id": 0, "key": 0}
    return lambda: rollout(split, prompts, **settings).tokens_BT


def tunix_mesh() -> object:
    """A mesh of one device, with the axes that tunix's models are sharded over."""
    import jax

    return jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))


def tunix_model(folder: str, arch: object) -> object:
    """tunix's Qwen2 model of a checkpoint, in float32 on one device."""
    import jax.numpy as jnp
    from tunix.models.qwen2.model import ModelConfig
    from tunix.models.qwen2.params import create_model_from_safe_tensors

    config = ModelConfig(
        num_layers=arch.layers, vocab_size=arch.vocab_size, embed_dim=arch.width,
        hidden_dim=arch.mlp_width, num_heads=arch.query_heads, head_dim=arch.head_dim,
        num_kv_heads=arch.kv_heads, rope_theta=int(arch.rope_theta), norm_eps=arch.rms_norm_eps,
        use_tied_embedding=arch.tied,
    )  # fmt: skip
    return create_model_from_safe_tensors(folder, config, tunix_mesh(), dtype=jnp.float32)


def with_tunix(
    folder: str, arch: object, prompts: list[list[int]], new: int, spare: int
) -> Callable[[], np.ndarray]:
    from tunix.generate.sampler import CacheConfig, Sampler

    class Ids:
        """Prompts are given as numbers already: a text is one's index."""

        def encode(self, text: str, **_: object) -> list[int]:
            return prompts[int(text)]

        def decode(self, ids: list[int], **_: object) -> str:
            return " ".join(map(str, ids))

        def bos_id(self) -> None:
            return None

        def eos_id(self) -> int:
            return NO_TOKEN

        def pad_id(self) -> int:
            return 0

    model = tunix_model(folder, arch)
    length = len(prompts[0])
    cache = CacheConfig(length + new + spare, arch.layers, arch.kv_heads, arch.head_dim)
    sampler = Sampler(model, Ids(), cache)
    texts = [str(index) for index in range(len(prompts))]

    def run() -> np.ndarray:
        made = sampler(texts, max_generation_steps=new, max_prompt_length=length,
                       eos_tokens=[NO_TOKEN])  # fmt: skip
        return np.stack([np.asarray(tokens) for tokens in made.tokens])

    return run


if __name__ == "__main__":
    main()
