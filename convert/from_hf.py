"""Hugging Face checkpoint → jexit model directory.

    python -m convert.from_hf --source=HF_DIR_OR_HUB_ID --target=DIR

Reads safetensors (single or sharded) from a directory or the hub's local cache, one parameter at a
time, checks every tensor's name and shape, and writes the directory whole or not at all. Weights
keep the dtype that they have in the checkpoint. A PEFT adapter and exit heads come along when the
source has them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np


def convert(source: str, target: str) -> str:
    """Converts and returns a one-line summary; raises UserError or OSError with one sentence."""
    from jexit.io.atomic import atomic_directory
    from jexit.io.model_dir import write_model
    from jexit.io.model_source import open_model

    model = open_model(source)
    model.find_tokenizer()
    weights = model.weights()
    count = 0

    def counted() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal count
        for path, array in weights.parameters():
            count += array.size
            yield path, array
            del array  # before the next one is read

    with atomic_directory(target) as partial:
        write_model(
            partial,
            model.architecture,
            weights=counted(),
            adapters=model.adapters(),
            exits=model.exits(),
            exit_layers=model.exit_layers,
            exit_head=model.exit_head,
            lora=model.lora,
            tokenizer=model.tokenizer,
            source=model.source,
        )
    arch = model.architecture
    dtype = weights.dtypes()["embed.embedding"].name
    return (
        f"wrote {target}: {arch.family}, {arch.layers} layers × {arch.width}, "
        f"{count / 1e6:,.1f} M parameters, {dtype}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m convert.from_hf", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--source", required=True, help="directory of a checkpoint, or hub id")
    parser.add_argument("--target", required=True, help="model directory to write")
    options = parser.parse_args(argv)
    return run(lambda: convert(options.source, options.target))


def run(command: Callable[[], str]) -> int:
    """Runs a conversion: its summary on stdout, or one sentence on stderr and exit code 1."""
    from jexit.io import storage_errors

    storage_errors.say_once()
    try:
        print(command())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # conversion needs no accelerator and should not hold one
    sys.exit(main())
