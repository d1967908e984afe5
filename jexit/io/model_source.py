"""Opens model directories of every format without reading the weights.

A model directory is one of these:
- jexit's own format (`jexit.json`), written by `convert.from_hf` and by runs, with the base weights
  in the directory itself or in another directory that `jexit.json` names;
- a Hugging Face checkpoint (`config.json` and safetensors);
- a PEFT adapter (`adapter_config.json`), which names the directory of its base model.
A Hugging Face checkpoint or a PEFT adapter may also contain exit heads (`exit_heads.json`).
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re

import numpy as np

import jexit
from jexit.config import COMMANDS, TINY_PRESET, ExitSettings, LoRA, check_rising
from jexit.data.tokenizer import Tokenizer, token_ids
from jexit.errors import MissingFile, UserError, without_remedy
from jexit.io.hf_config import (
    ADAPTER_CONFIG,
    EXIT_CONFIG,
    read_adapter_config,
    read_architecture,
    read_exit_config,
)
from jexit.io.hub import cached, is_hub_id
from jexit.io.weights import (
    FOLDERS,
    Part,
    Safetensors,
    StoredArrays,
    Weights,
    adapter_part,
    base_part,
    exit_part,
)
from jexit.presets import PRESETS, Architecture
from jexit.settings import build, checked
from jexit.untrusted import check_files, read_object

MODEL_FILE = "jexit.json"
FORMAT_VERSION = 1
ASSETS = "jexit/assets/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """The description of a model directory, with methods that read its weights and tokenizer."""

    directory: pathlib.Path
    base: pathlib.Path  # the directory that contains the base weights
    architecture: Architecture
    exit_layers: tuple[int, ...] = ()  # empty: no exit heads
    exit_head: ExitSettings = ExitSettings()
    lora: LoRA | None = None
    source: str = ""  # Hugging Face directory or hub id of the base; empty when trained here
    eos_ids: tuple[int, ...] = ()

    def weights(self) -> Weights:
        """Opens the base weights without reading their values.

        Raises MissingFile if the weights are missing, and UserError if they do not match the
        architecture.
        """
        return _opened(self.base, base_part(self.architecture))

    def adapters(self) -> dict[str, np.ndarray]:
        """Returns the LoRA parameters by dotted path, in float32; {} if there are no adapters."""
        return self._read(self.lora and adapter_part(self.architecture, self.lora))

    def exits(self) -> dict[str, np.ndarray]:
        """Returns the parameters of exit heads and continuation by dotted path, in float32.

        The result is {} if there are no exit heads.
        """
        layers = self.exit_layers
        return self._read(exit_part(self.architecture, layers, self.exit_head) if layers else None)

    def _read(self, part: Part | None) -> dict[str, np.ndarray]:
        parameters = _opened(self.directory, part).parameters() if part else ()
        return {path: array.astype(np.float32) for path, array in parameters}

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer, with `self.eos_ids` added to its end-of-sequence tokens.

        Raises UserError if the tokenizer has more tokens than the model has embeddings.
        """
        directory = self.find_tokenizer()
        tokenizer = Tokenizer.load(directory)
        tokenizer.eos_ids |= frozenset(self.eos_ids)
        if tokenizer.vocab_size > self.architecture.vocab_size:
            raise UserError(
                f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens, but the model "
                f"has only {self.architecture.vocab_size} embeddings; use the model's own tokenizer"
            )
        return tokenizer

    def find_tokenizer(self) -> pathlib.Path:
        """Returns the directory with the tokenizer's files.

        This is `self.directory` if it contains a tokenizer_config.json, otherwise `self.base`.
        Raises MissingFile if the tokenizer's files are not there.
        """
        own = (self.directory / "tokenizer_config.json").exists()
        return Tokenizer.find(self.directory if own else self.base)


def _opened(directory: pathlib.Path, part: Part) -> Weights:
    return (StoredArrays if _is_own(directory) else Safetensors)(directory, part)


def _is_own(directory: pathlib.Path) -> bool:
    return (directory / MODEL_FILE).exists()


def open_model(path: str | os.PathLike[str], above: tuple[pathlib.Path, ...] = ()) -> ModelSource:
    """Returns the description of the model at `path`, without reading the weights.

    `path` is a model directory, the directory of a run, or the id of a model in the hub's local
    cache. `above` contains the directories of the models that are based on this one, from the
    outermost to the innermost, to detect a cycle. Raises MissingFile if there is no model at
    `path`, and UserError if the model cannot be used, such as one that is its own base.
    """
    directory = find_model(path)
    if directory.resolve() in above:
        raise UserError(
            f"{above[-1]} names {directory} as its base model, but base models must not form a "
            f"cycle; correct the path in {_naming_file(above[-1])}"
        )
    above = (*above, directory.resolve())
    check_files(directory, FOLDERS)
    if _is_own(directory):
        source = _open_own(directory, above)
    elif (directory / ADAPTER_CONFIG).exists():
        lora, reference = read_adapter_config(directory)
        base = _open_base(reference, directory, above)
        source = dataclasses.replace(
            base, directory=directory, lora=lora, exit_layers=(), exit_head=ExitSettings()
        )
    elif (directory / "config.json").exists():
        hub_id = "" if pathlib.Path(path).is_dir() else str(path)
        source = ModelSource(
            directory=directory,
            base=directory,
            architecture=read_architecture(directory),
            source=hub_id if is_hub_id(hub_id) else str(directory.resolve()),
        )
    else:
        raise MissingFile(
            f"{directory} contains no model (none of {MODEL_FILE}, config.json, {ADAPTER_CONFIG}); "
            "give a directory that convert.from_hf or a run has written, or one in Hugging Face "
            "format"
        )
    if not _is_own(directory) and (directory / EXIT_CONFIG).exists():
        layers, head = read_exit_config(directory)
        source = dataclasses.replace(source, exit_layers=layers, exit_head=head)
    layers = source.architecture.layers
    check_rising(source.exit_layers, layers, f"{directory} has exit heads at")
    return source


def _open_own(directory: pathlib.Path, above: tuple[pathlib.Path, ...]) -> ModelSource:
    file = directory / MODEL_FILE
    values = read_object(file, "copy it again")
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file} has format version {version!r}, but this version of jexit reads only "
            f"{FORMAT_VERSION}; make the model again, or use the version of jexit that wrote it"
        )
    lora = values.get("lora")
    try:
        source = ModelSource(
            directory=directory,
            base=directory,
            architecture=Architecture.from_dict(values["architecture"]),
            exit_layers=tuple(values.get("exit_layers") or ()),
            exit_head=build(ExitSettings, values.get("exit_head") or {}, "exit_head"),
            lora=build(LoRA, lora, "lora") if lora else None,
            source=checked(str, values.get("source") or "", "source"),
            eos_ids=token_ids(values.get("eos_ids"), "eos_ids contains"),
        )
        reference = checked(str, values.get("base") or "", "base")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else without_remedy(error)
        raise UserError(
            f"{file} is incomplete or corrupted ({reason}); convert the model again"
        ) from error
    if not reference:
        return source
    base = _open_base(reference, directory, above, source.architecture).base
    return dataclasses.replace(source, base=base)


def _open_base(
    reference: str,
    directory: pathlib.Path,
    above: tuple[pathlib.Path, ...],
    architecture: Architecture | None = None,
) -> ModelSource:
    """Opens the base model to which `directory` refers by the path or hub id `reference`.

    A relative path is tried in `directory` first. Raises MissingFile if there is no model at
    `reference`. Raises UserError if the base has adapters, or if its architecture is not
    `architecture` (None: any).
    """
    beside = directory / reference
    try:
        base = open_model(beside.resolve() if reference and beside.is_dir() else reference, above)
    except MissingFile as error:
        raise MissingFile(
            f"{directory} needs its base model at {reference or 'an empty path'}, but no model was "
            "found there; restore the base model, or correct the path in "
            f"{_naming_file(directory)} (a path relative to that file works)"
        ) from error
    if base.lora is not None:
        raise UserError(
            f"the base model {base.directory} of {directory} has adapters of its own, but a base "
            "model must not have any; merge them first with convert.to_hf --adapter=merge"
        )
    if architecture is not None and base.architecture != architecture:
        raise UserError(
            f"the base model {base.directory} of {directory} has been replaced by another model "
            f"({difference(architecture, base.architecture)}); restore the base model that "
            f"{directory} was trained on"
        )
    return base


def _naming_file(directory: pathlib.Path) -> str:
    return MODEL_FILE if _is_own(directory) else ADAPTER_CONFIG


def difference(stored: Architecture, found: Architecture) -> str:
    """Returns the first difference of two architectures, such as "layers is 4 instead of 6"."""
    ours, theirs = stored.to_dict(), found.to_dict()
    key = next(key for key in ours if ours[key] != theirs[key])
    return f"{key} is {theirs[key]} instead of {ours[key]}"


def find_model(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the model directory to which `path`, a path or a hub id, refers.

    A relative path is looked up in the working directory, and a path `jexit/assets/...` also in the
    installed package. OWNER/NAME is looked up in the hub's local cache, and nothing is downloaded.
    For the directory of a run, the result is its subdirectory `model`. Raises MissingFile if there
    is no model or the run has not finished, and UserError if `path` is a file.
    """
    text = os.fspath(path)
    if text and pathlib.Path(text).is_dir():
        of_run = pathlib.Path(text) / "model"
        if (of_run / MODEL_FILE).exists():
            return of_run
        if (pathlib.Path(text) / "checkpoints").is_dir():
            raise MissingFile(
                f"{text} is a run that has not finished, so it does not contain a model yet; run "
                "its command again to finish it"
            )
        return pathlib.Path(text)
    if text.startswith(ASSETS):
        shipped = pathlib.Path(jexit.__file__).parent.parent / text
        if shipped.is_dir():
            return shipped
    if text and pathlib.Path(text).exists():
        raise UserError(
            f"{text} is a file, but a model is a directory with a config and weights; give such a "
            "directory"
        )
    if remedy := _maker(text):
        raise MissingFile(f"there is no model at {text}; make it with {remedy}")
    if not is_hub_id(text):
        raise MissingFile(
            f"there is no model directory at {text!r}; give a directory that convert.from_hf or a "
            "run has written, or one in Hugging Face format"
        )
    return cached(text)


def _maker(text: str) -> str:
    """Returns the command that makes the model at models/PRESET or runs/COMMAND-PRESET, else ""."""
    if (found := re.fullmatch(r"models/([\w.-]+)", text)) and found[1] in PRESETS:
        return f"python -m convert.from_hf --source={PRESETS[found[1]].hub_id} --target={text}"
    run = re.fullmatch(rf"runs/({'|'.join(COMMANDS)})-([\w.-]+?)(/model)?", text)
    if run is None or run[2] not in (TINY_PRESET, *PRESETS):
        return ""
    return f"python -m jexit.main --config=configs/{run[1]}.py:{run[2]}"
