"""Hugging Face checkpoint → jexit model directory.

    python -m convert.from_hf --source=HF_DIR_OR_HUB_ID --target=DIR [--download]

Reads safetensors (single or sharded) from a directory or the hub's local cache, into which
--download fetches what is not there yet, one parameter at a
time, checks every tensor's name and shape, and writes the directory whole or not at all. Weights
keep the dtype that they have in the checkpoint. A PEFT adapter and exit heads come along when the
source has them.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence

import jax

from jexit.io import storage_errors
from jexit.io.atomic_directory import atomic_directory
from jexit.io.hub import download
from jexit.io.model_dir import write_model
from jexit.io.model_source import open_model
from jexit.io.weights import base_part


def convert(source: str, target: str, *, fetch: bool = False) -> str:
    """Converts and returns a one-line summary; raises UserError or OSError with one sentence."""
    if fetch:
        download(source)
    model = open_model(source)
    model.find_tokenizer()
    weights = model.weights()
    with atomic_directory(target) as partial:
        copy = dataclasses.replace(model, directory=partial)
        parameters, adapters, exits = weights.parameters(), model.adapters(), model.exits()
        write_model(copy, parameters, adapters, exits, model.tokenizer)
    arch = model.architecture
    count = sum(map(math.prod, base_part(arch).shapes().values()))
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
    parser.add_argument("--download", action="store_true", help="fetch a hub id that is not here")
    options = parser.parse_args(argv)
    return run(lambda: convert(options.source, options.target, fetch=options.download))


def run(command: Callable[[], str]) -> int:
    """Runs a conversion: its summary on stdout, or one sentence on stderr and exit code 1."""
    jax.config.update("jax_platforms", "cpu")  # conversion should not hold an accelerator
    storage_errors.say_once()
    try:
        print(command())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
