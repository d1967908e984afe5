"""Converts a Hugging Face checkpoint to a jexit model directory.

    python -m convert.from_hf --source=HF_DIR_OR_HUB_ID --target=DIR [--download] [--layers=N]

Reads safetensors (one file or shards) from a directory or from the hub's local cache. With
--download, files that the cache lacks are downloaded first. Reads one parameter at a time to keep
memory use low, checks the name and shape of every tensor, and writes the target directory either
completely or not at all. Weights keep the dtype of the checkpoint. If the source contains a PEFT
adapter or exit heads, these are converted too.

--layers keeps only the first N layers, to train a smaller model from them. The output head then
reads residuals that it was not trained on, so fine-tune the result (configs/finetune.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence

import jax

from jexit.errors import UserError, command
from jexit.io import storage_errors
from jexit.io.atomic_directory import atomic_directory
from jexit.io.hub import download
from jexit.io.model_dir import write_model
from jexit.io.model_source import ModelSource, open_model
from jexit.io.weights import base_part


def convert(source: str, target: str, *, fetch: bool = False, layers: int | None = None) -> str:
    """Converts the checkpoint `source` to the model directory `target`; returns a one-line summary.

    `source` is a directory or a hub id. With `fetch`, files that the hub's local cache lacks are
    downloaded first. Unless `layers` is None, only the first `layers` layers are kept. Raises
    UserError if `source` cannot be read or `target` cannot be written.
    """
    if fetch:
        download(source)
    model = open_model(source)
    model.find_tokenizer()
    weights = model.weights()
    described = model if layers is None else _cut(model, layers)
    with atomic_directory(target) as partial:
        copy = dataclasses.replace(described, directory=partial)
        parameters = (
            (path, array[:layers] if path.startswith("blocks.") else array)
            for path, array in weights.parameters()
        )
        write_model(copy, parameters, model.adapters(), model.exits(), model.tokenizer)
    arch = described.architecture
    count = sum(map(math.prod, base_part(arch).shapes().values()))
    dtype = weights.dtypes()["embed.embedding"].name
    return (
        f"wrote {target}: {arch.family}, {arch.layers} layers × {arch.width}, "
        f"{count / 1e6:,.1f} M parameters, {dtype}"
    )


def _cut(model: ModelSource, layers: int) -> ModelSource:
    """Returns the description of a model reduced to its first `layers` layers.

    Raises UserError if `layers` is out of range, or if the model has adapters or exits.
    """
    arch = model.architecture
    if not 1 <= layers < arch.layers:
        raise UserError(
            f"--layers is {layers}, but it must be at least 1 and less than {arch.layers}, the "
            "number of layers of the model; change it"
        )
    if model.lora or model.exit_layers:
        raise UserError(
            f"{model.directory} has adapters or exit heads, which were trained for all layers; "
            "use --layers on the base model from which it was trained"
        )
    cut = dataclasses.replace(arch, layers=layers)
    return dataclasses.replace(model, architecture=cut, source="")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m convert.from_hf", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--source", required=True, help="directory of a checkpoint, or hub id")
    parser.add_argument("--target", required=True, help="model directory to write")
    parser.add_argument(
        "--download",
        dest="fetch",
        action="store_true",
        help="download a hub id that is not in the cache",
    )
    parser.add_argument("--layers", type=int, metavar="N", help="keep only the first N layers")
    options = vars(parser.parse_args(argv))
    return run(lambda: convert(**options))


@command
def run(conversion: Callable[[], str]) -> int:
    """Runs a conversion, prints its summary or error, and returns the exit code (0 or 1)."""
    jax.config.update("jax_platforms", "cpu")  # a conversion should not occupy an accelerator
    storage_errors.say_once()
    print(conversion())
    return 0


if __name__ == "__main__":
    sys.exit(main())
