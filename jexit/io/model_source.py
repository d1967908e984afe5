"""Model directories of every kind, opened without reading their weights.

A model directory is one of
- jexit's own (`jexit.json`; written by `convert.from_hf` and by runs), with its base weights inside
  or in another directory that it names;
- Hugging Face's (`config.json` and safetensors);
- a PEFT adapter (`adapter_config.json`) that names its base;
the last two with exit heads beside (`exit_heads.json`) or not.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import reprlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

import jexit
from jexit.data.tokenizer import Tokenizer, token_ids
from jexit.io import huggingface
from jexit.io.array_store import ArrayStore
from jexit.io.hf_config import read_architecture
from jexit.model.exits import ExitSettings
from jexit.model.lora import LoRA
from jexit.presets import Architecture
from jexit.untrusted import check_files, read_object

MODEL_FILE = "jexit.json"
FORMAT_VERSION = 1
BASE, ADAPTERS, EXITS = "base", "adapters", "exits"  # folders of arrays in jexit's own format
ASSETS = "jexit/assets/"


class Weights(Protocol):
    """Base weights on disk: what they are, and each parameter in turn."""

    def dtypes(self) -> dict[str, np.dtype]: ...

    def parameters(self) -> Iterator[tuple[str, np.ndarray]]: ...


class StoredPart:
    """The base weights, adapters or exit heads of a directory in jexit's own format.

    Raises FileNotFoundError when there are none, and ValueError when names or shapes are not those
    `expected`; nothing is allocated before.
    """

    def __init__(self, directory: pathlib.Path, part: str, expected: huggingface.Shapes):
        self._store = ArrayStore(directory / part)
        self._specs = {name: self._store.spec(name) for name in self._store.names()}
        if not self._specs:
            raise FileNotFoundError(
                f"{directory} lacks its {'weights' if part == BASE else part} ({part}/); convert "
                "or copy the model again"
            )
        found = {name: spec.shape for name, spec in self._specs.items()}
        huggingface.check_shapes(self._store.directory, found, expected)

    def dtypes(self) -> dict[str, np.dtype]:
        return {name: spec.dtype for name, spec in self._specs.items()}

    def parameters(self) -> Iterator[tuple[str, np.ndarray]]:
        # The largest first: what has been placed already is then small when memory peaks.
        for name in sorted(self._specs, key=lambda name: -self._specs[name].bytes):
            yield name, self._store.read(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """What a model directory holds; weights are read by the methods."""

    directory: pathlib.Path
    base: pathlib.Path  # the directory that holds the base weights
    architecture: Architecture
    exit_layers: tuple[int, ...] = ()  # empty: no exit heads
    exit_head: ExitSettings = ExitSettings()
    lora: LoRA | None = None
    source: str = ""  # Hugging Face directory or hub id of the base; empty when trained here
    eos_ids: tuple[int, ...] = ()

    def weights(self) -> Weights:
        """The base weights; raises ValueError when they are not the architecture's."""
        if (self.base / MODEL_FILE).exists():
            return StoredPart(self.base, BASE, huggingface.base_shapes(self.architecture))
        return huggingface.HFWeights(self.base, self.architecture)

    def adapters(self) -> dict[str, np.ndarray]:
        """LoRA parameters by path, float32; empty when there are none."""
        if self.lora is None:
            return {}
        if (self.directory / MODEL_FILE).exists():
            return self._stored(ADAPTERS, huggingface.adapter_shapes(self.architecture, self.lora))
        return huggingface.read_adapters(self.directory, self.architecture, self.lora)

    def exits(self) -> dict[str, np.ndarray]:
        """Exit-head parameters by path, float32; empty when there are none."""
        if not self.exit_layers:
            return {}
        if (self.directory / MODEL_FILE).exists():
            shapes = huggingface.exit_shapes(self.architecture, self.exit_layers, self.exit_head)
            return self._stored(EXITS, shapes)
        return huggingface.read_exits(
            self.directory, self.architecture, self.exit_layers, self.exit_head
        )

    def tokenizer(self) -> Tokenizer:
        """The directory's tokenizer, or its base's when an adapter brings none."""
        directory = self.find_tokenizer()
        tokenizer = Tokenizer.load(directory)
        tokenizer.eos_ids |= frozenset(self.eos_ids)
        if tokenizer.vocab_size > self.architecture.vocab_size:
            raise ValueError(
                f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens, the model only "
                f"{self.architecture.vocab_size} embeddings; use the model's own tokenizer"
            )
        return tokenizer

    def find_tokenizer(self) -> pathlib.Path:
        """Where the tokenizer lies; raises FileNotFoundError when it lacks files, reads none."""
        own = (self.directory / "tokenizer_config.json").exists()
        return Tokenizer.find(self.directory if own else self.base)

    def _stored(self, part: str, shapes: huggingface.Shapes) -> dict[str, np.ndarray]:
        stored = StoredPart(self.directory, part, shapes).parameters()
        return {name: array.astype(np.float32) for name, array in stored}


def open_model(path: str | os.PathLike[str]) -> ModelSource:
    """Finds and describes a model directory (or hub id in the local cache).

    Raises FileNotFoundError when there is no model, ValueError when it cannot be used.
    """
    return _open(path, ())


def _open(path: str | os.PathLike[str], above: tuple[pathlib.Path, ...]) -> ModelSource:
    """`open_model`, within the chain of directories `above`, each based on the next."""
    directory = find_model(path)
    if directory.resolve() in above:
        raise ValueError(
            f"{above[-1]} names {directory}, which is made of it, as its base; correct the path in "
            f"{_naming_file(above[-1])}"
        )
    above = (*above, directory.resolve())
    check_files(directory, (BASE, ADAPTERS, EXITS))
    if (directory / MODEL_FILE).exists():
        source = _open_own(directory, above)
    elif (directory / huggingface.ADAPTER_CONFIG).exists():
        source = _open_adapter(directory, above)
    elif (directory / "config.json").exists():
        hub_id = "" if pathlib.Path(path).is_dir() else str(path)
        source = ModelSource(
            directory=directory,
            base=directory,
            architecture=read_architecture(directory),
            source=hub_id if is_hub_id(hub_id) else str(directory.resolve()),
        )
    else:
        raise FileNotFoundError(
            f"{directory} holds no model (none of {MODEL_FILE}, config.json, "
            f"{huggingface.ADAPTER_CONFIG}); give a directory of convert.from_hf, of a run, or in "
            "Hugging Face format"
        )
    if not (directory / MODEL_FILE).exists() and (directory / huggingface.EXIT_CONFIG).exists():
        layers, head = huggingface.read_exit_config(directory)
        source = dataclasses.replace(source, exit_layers=layers, exit_head=head)
    _check_exit_layers(source)
    return source


def _open_own(directory: pathlib.Path, above: tuple[pathlib.Path, ...]) -> ModelSource:
    file = directory / MODEL_FILE
    values = read_object(file, "copy it again")
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {version!r}; this jexit reads {FORMAT_VERSION}: make the "
            "model again, or use the jexit that wrote it"
        )
    try:
        architecture = Architecture.from_dict(values["architecture"])
        lora = _lora(values.get("lora"))
        head = ExitSettings(**(values.get("exit_head") or {}))
        exits = tuple(values.get("exit_layers") or ())
        eos_ids = token_ids(values.get("eos_ids"))
        reference, origin = (_text(values, key) for key in ("base", "source"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is incomplete or altered ({error}); convert it again") from error
    base = directory
    if reference:
        base = _open_base(reference, directory, above, architecture).base
    return ModelSource(
        directory=directory,
        base=base,
        architecture=architecture,
        exit_layers=exits,
        exit_head=head,
        lora=lora,
        source=origin,
        eos_ids=eos_ids,
    )


def _open_adapter(directory: pathlib.Path, above: tuple[pathlib.Path, ...]) -> ModelSource:
    lora, reference = huggingface.read_adapter_config(directory)
    base = _open_base(reference, directory, above)
    return dataclasses.replace(
        base,
        directory=directory,
        lora=lora,
        exit_layers=(),
        exit_head=ExitSettings(),
    )


def _open_base(
    reference: str,
    directory: pathlib.Path,
    above: tuple[pathlib.Path, ...],
    architecture: Architecture | None = None,
) -> ModelSource:
    """The base that a directory refers to; relative paths are taken from that directory first."""
    beside = directory / reference
    try:
        base = _open(beside.resolve() if reference and beside.is_dir() else reference, above)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{directory} needs its base model at {reference or 'no place it names'}, which is "
            f"gone or empty; restore it, or correct the path in {_naming_file(directory)} (a path "
            "relative to that file works)"
        ) from error
    if base.lora is not None:
        raise ValueError(
            f"the base {base.directory} of {directory} has adapters itself; merge them first with "
            "convert.to_hf --adapter=merge"
        )
    if architecture is not None and base.architecture != architecture:
        raise ValueError(
            f"the base {base.directory} of {directory} is another model now "
            f"({_difference(architecture, base.architecture)}); restore the one it was trained on"
        )
    return base


def _naming_file(directory: pathlib.Path) -> str:
    own = (directory / MODEL_FILE).exists()
    return MODEL_FILE if own else huggingface.ADAPTER_CONFIG


def _difference(stored: Architecture, found: Architecture) -> str:
    ours, theirs = stored.to_dict(), found.to_dict()
    key = next(key for key in ours if ours[key] != theirs[key])
    return f"{key} {theirs[key]} in place of {ours[key]}"


def _check_exit_layers(source: ModelSource) -> None:
    exits, layers = source.exit_layers, source.architecture.layers
    rising = all(isinstance(e, int) for e in exits) and list(exits) == sorted(set(exits))
    if not rising or (exits and not 1 <= exits[0] <= exits[-1] < layers):
        raise ValueError(
            f"{source.directory} has exit heads at {reprlib.repr(exits)}; exits are rising layer "
            f"numbers from 1 to {layers - 1}"
        )


def _text(values: dict[str, Any], key: str) -> str:
    value = values.get(key) or ""
    if not isinstance(value, str):
        raise ValueError(f"{key} is no text")
    return value


def _lora(values: dict[str, Any] | None) -> LoRA | None:
    return LoRA(**{**values, "targets": tuple(values["targets"])}) if values else None


def find_model(path: str | os.PathLike[str]) -> pathlib.Path:
    """The directory that a model path or hub id means.

    A relative path counts from the working directory; `jexit/assets/...` is also found in the
    installed package; OWNER/NAME is also looked up in the hub's local cache, never downloaded. A
    run's directory means the model in it.
    """
    text = os.fspath(path)
    if text and pathlib.Path(text).is_dir():
        of_run = pathlib.Path(text) / "model"
        if (of_run / MODEL_FILE).exists():
            return of_run
        if (pathlib.Path(text) / "checkpoints").is_dir():
            raise FileNotFoundError(
                f"{text} is a run that has not finished, so it holds no model yet; run its command "
                "again"
            )
        return pathlib.Path(text)
    if text.startswith(ASSETS):
        shipped = pathlib.Path(jexit.__file__).parent.parent / text
        if shipped.is_dir():
            return shipped
    if text and pathlib.Path(text).exists():
        raise ValueError(f"{text} is a file; give the directory of a model")
    if not is_hub_id(text):
        raise FileNotFoundError(
            f"no model directory at {text!r}; give a directory of convert.from_hf, of a run, or in "
            "Hugging Face format"
        )
    return _hub_directory(text)


def is_hub_id(text: str) -> bool:
    """Whether the text could be an OWNER/NAME of the hub."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None


def _hub_directory(hub_id: str) -> pathlib.Path:
    from huggingface_hub import snapshot_download

    try:
        return pathlib.Path(snapshot_download(hub_id, local_files_only=True))
    except Exception as error:  # the library raises many kinds when nothing is cached
        raise FileNotFoundError(
            f"there is no directory {hub_id}, nor a model of that name in the hub's local cache; "
            f"fetch a hub model first (hf download {hub_id}), or give a model directory"
        ) from error
