"""Converts a jexit model directory to a Hugging Face directory.

    python -m convert.to_hf --source=DIR --target=HF_DIR [--adapter=merge|peft]
                            [--dtype=auto|float32|bfloat16|float16] [--base=PATH_OR_HUB_ID]
                            [--card] [--push=OWNER/NAME] [--eval=DIR]

--adapter=merge (the default) adds the LoRA adapter to the base weights and writes a checkpoint that
transformers loads. --adapter=peft writes only the adapter, in `peft`'s format, with a reference to
its base model. The base is --base if given, otherwise the checkpoint from which the model was
converted. If that checkpoint is not available, the base weights are written to HF_DIR/base. Either
way, HF_DIR also contains the tokenizer with its chat template, and the exit heads in
exit_heads.safetensors with their description in exit_heads.json. --dtype is the dtype of the base
weights that are written, merged or not (auto: as stored).

--card writes a model card as README.md, with the results of --eval (a directory of configs/eval.py;
by default the run's own evaluation). --push writes the card too, and uploads HF_DIR to the Hugging
Face hub with the token of `hf auth login`. If the repository does not exist, --push creates a
private one.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from convert.from_hf import run
from convert.model_card import CARD, model_card
from jexit.config import LoRA
from jexit.data.tokenizer import Tokenizer
from jexit.errors import UserError
from jexit.io.atomic_directory import atomic_directory
from jexit.io.files import write_json
from jexit.io.hf_config import (
    ADAPTER_CONFIG,
    EXIT_CONFIG,
    adapter_config,
    config_of_architecture,
    exit_config,
)
from jexit.io.hub import is_hub_id, upload
from jexit.io.model_dir import write_eos_ids
from jexit.io.model_source import MODEL_FILE, ModelSource, open_model
from jexit.io.weights import Part, adapter_part, base_part, exit_part, write_safetensors

MODELING = pathlib.Path(__file__).with_name("modeling_jexit.py")
CLASSES = {
    "llama": "JexitLlamaForCausalLM",
    "qwen2": "JexitQwen2ForCausalLM",
    "qwen3": "JexitQwen3ForCausalLM",
}


def export(
    source: str,
    target: str,
    *,
    adapter: str = "merge",
    dtype: str = "auto",
    base: str = "",
    card: bool = False,
    push: str = "",
    evaluation: str = "",
) -> str:
    """Exports the model at `source` to the Hugging Face directory `target`; returns a summary.

    The parameters are the command-line options of this module; `evaluation` is --eval. Raises
    UserError or OSError if options contradict each other, or if files cannot be read, written or
    uploaded.
    """
    model = open_model(source)
    arch = model.architecture
    model.find_tokenizer()
    if adapter == "peft" and model.lora is None:
        raise UserError(f"{source} has no LoRA adapter to write; use --adapter=merge")
    if adapter == "merge" and base:
        raise UserError(
            "--base names the base model of an adapter, but --adapter=merge writes no adapter; "
            "leave out --base, or use --adapter=peft"
        )
    if push and not is_hub_id(push):
        raise UserError(
            f"--push is {push!r}, but it must be OWNER/NAME of a repository on the hub; give such "
            "a name"
        )
    if push and adapter == "peft" and not is_hub_id(base or _published_base(model)):
        raise UserError(
            "the base model of this adapter is not on the hub, so nobody else could load the "
            "adapter from there; use --adapter=merge, or name its base model with "
            "--base=OWNER/NAME"
        )
    if evaluation and not (card or push):
        raise UserError(
            "--eval is given, but only a model card uses it; add --card or --push, or leave --eval "
            "out"
        )
    text = ""
    if card or push:
        name = push or pathlib.Path(target).resolve().name
        peft = adapter == "peft"
        text = model_card(source, model, name=name, adapter=peft, evaluation=evaluation)
    with atomic_directory(target) as partial:
        if adapter == "peft":
            reference = base or _published_base(model)
            if not reference:
                (partial / "base").mkdir()
                _write_checkpoint(partial / "base", model, {}, dtype)
                reference = str(pathlib.Path(target).absolute() / "base")
            write_json(partial / ADAPTER_CONFIG, adapter_config(model.lora, reference))
            _write_part(partial, adapter_part(arch, model.lora), model.adapters())
            _write_tokenizer(partial, model.tokenizer())
        else:
            _write_checkpoint(partial, model, model.adapters(), dtype, exits=True)
        if model.exit_layers:
            layers, head = model.exit_layers, model.exit_head
            write_json(partial / EXIT_CONFIG, exit_config(layers, head, arch.rms_norm_eps))
            _write_part(partial, exit_part(arch, layers, head), model.exits())
        if text:
            (partial / CARD).write_text(text, "utf-8")
    if push:
        upload(target, push)
    what = "adapter" if adapter == "peft" else "checkpoint"
    heads = f", exit heads at {', '.join(map(str, model.exit_layers))}" if model.exit_layers else ""
    pushed = f"; uploaded to {push}" if push else ""
    return f"wrote {target}: {what} of a {arch.family} model{heads}{pushed}"


def _published_base(model: ModelSource) -> str:
    """Returns the hub id or existing directory of the base model, or "" if neither is known."""
    if not (model.base / MODEL_FILE).exists():
        return model.source or str(model.base.resolve())
    known = model.source
    return known if known and (is_hub_id(known) or pathlib.Path(known).is_dir()) else ""


def _write_checkpoint(
    directory: pathlib.Path,
    model: ModelSource,
    adapters: Mapping[str, np.ndarray],
    dtype: str,
    *,
    exits: bool = False,
) -> None:
    weights = model.weights()
    dtypes = weights.dtypes()
    if dtype != "auto":
        dtypes = dict.fromkeys(dtypes, jnp.dtype(dtype))
    merged = _merged(weights.parameters(), adapters, model.lora, dtypes)
    write_safetensors(directory, base_part(model.architecture), dtypes, merged)
    tokenizer = model.tokenizer()  # after the weights, which keeps memory low
    config = config_of_architecture(
        model.architecture,
        dtype=dtypes["embed.embedding"].name,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.backend.bos_token_id,
    )
    if exits and model.exit_layers:  # code that transformers runs where it is trusted
        shutil.copyfile(MODELING, directory / MODELING.name)
        config["auto_map"] = {
            "AutoModelForCausalLM": f"{MODELING.stem}.{CLASSES[model.architecture.family]}"
        }
    write_json(directory / "config.json", config)
    _write_tokenizer(directory, tokenizer)


def _write_part(directory: pathlib.Path, part: Part, parameters: dict[str, np.ndarray]) -> None:
    dtypes = {path: array.dtype for path, array in parameters.items()}
    write_safetensors(directory, part, dtypes, parameters.items())


def _merged(
    parameters: Iterator[tuple[str, np.ndarray]],
    adapters: Mapping[str, np.ndarray],
    lora: LoRA | None,
    dtypes: Mapping[str, np.dtype],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the base weights with the LoRA adapters added: W + (alpha / rank) · A · B.

    `parameters` and `adapters` contain W, A and B by dotted path. The sum is computed in float32
    and converted to the dtype that `dtypes` contains for the path.
    """
    for path, array in parameters:
        projection = path.removesuffix(".kernel")
        if f"{projection}.lora_a" not in adapters:
            yield path, array.astype(dtypes[path], copy=False)
            del array  # before the next one is read
            continue
        lora_a, lora_b = adapters[f"{projection}.lora_a"], adapters[f"{projection}.lora_b"]
        folded = np.empty(array.shape, dtypes[path])
        for layer, kernel in enumerate(array):
            update = lora.scale * np.tensordot(lora_a[layer], lora_b[layer], 1)
            folded[layer] = kernel.astype(np.float32) + update
        del array, kernel
        yield path, folded
        del folded


def _write_tokenizer(directory: pathlib.Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(directory)
    write_eos_ids(directory, tokenizer)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m convert.to_hf", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--source", required=True, help="model directory of jexit")
    parser.add_argument("--target", required=True, help="Hugging Face directory to write")
    parser.add_argument("--adapter", choices=("merge", "peft"), default="merge")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto"
    )
    parser.add_argument(
        "--base", default="", help="path or hub id that the adapter names as its base"
    )
    parser.add_argument("--card", action="store_true", help="write a model card")
    parser.add_argument("--push", default="", help="OWNER/NAME on the hub to upload to")
    parser.add_argument(
        "--eval",
        dest="evaluation",
        metavar="EVAL",
        default="",
        help="evaluation whose results the card shows",
    )
    options = vars(parser.parse_args(argv))
    return run(lambda: export(**options))


if __name__ == "__main__":
    sys.exit(main())
