"""Loads and saves model directories: the weights, adapters, exit heads and tokenizer of a model."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

import jexit
from jexit.axes import Array
from jexit.config import (
    TRAINED_UNDER,
    Execution,
    ExitSettings,
    LoRA,
    check_exits,
    check_rising,
)
from jexit.data.tokenizer import Tokenizer, token_ids
from jexit.dist import is_primary, whole
from jexit.errors import UserError
from jexit.io.array_store import ArrayStore
from jexit.io.atomic_directory import atomic_directory
from jexit.io.files import write_json
from jexit.io.finite import all_finite
from jexit.io.model_source import (
    FORMAT_VERSION,
    MODEL_FILE,
    ModelSource,
    difference,
    open_model,
)
from jexit.model.exits import ExitParam
from jexit.model.lora import LoRAParam
from jexit.model.transformer import Transformer
from jexit.untrusted import read_object

Place = Callable[[str, np.ndarray], Array]


def load(
    directory: str | os.PathLike[str],
    *,
    dtype: str | jnp.dtype = "auto",
    exit_layers: tuple[int, ...] = (),
    exit_head: ExitSettings | None = None,
    lora: LoRA | None = None,
    execution: Execution = Execution(),
    seed: int = 0,
    place: Place = lambda path, array: jnp.asarray(array),
) -> tuple[Transformer, Tokenizer]:
    """Returns the model and the tokenizer of a model directory (see `jexit.io.model_source`).

    `dtype` is the dtype of the base weights: "auto" means float32 on CPUs and bfloat16 on
    accelerators. LoRA adapters and exit heads are always float32. `exit_layers` are the layers with
    an exit head, each given as the number of layers that run before the exit. `exit_head` contains
    the settings of the exit heads, and `lora` the settings of the adapters.

    Without `exit_layers`, `exit_head` and `lora`, the model gets the exit heads and the adapters
    that the directory contains. If the directory contains no exit heads, new ones are drawn from
    `seed` (by default at every 5th layer, or in the middle of a model of at most 5 layers). If
    `lora` is passed and the directory contains no adapters, new ones are drawn from `seed`.
    `execution` selects how the layers are computed. `place(path, array)` puts the parameter with
    the dotted path `path` on devices and returns it; `array` has the final dtype. By default,
    parameters are put on the first device.

    Raises UserError if the directory's exit heads or adapters differ from the requested ones, or if
    the directory's files are damaged. Raises MissingFile if the model or the tokenizer is missing.
    """
    source = open_model(directory)
    # Checked before memory is allocated: the files must match their description.
    weights, adapters, exits = source.weights(), source.adapters(), source.exits()
    layers, head = _exits_to_use(source, tuple(exit_layers), exit_head)
    settings: dict[str, Any] = {"exit_layers": layers, "exit_head": head}
    settings |= {"lora": _lora_to_use(source, lora), "dtype": _base_dtype(dtype)}

    def build() -> Transformer:
        rngs = nnx.Rngs(seed)
        return Transformer(source.architecture, **settings, execution=execution, rngs=rngs)

    graphdef, state = nnx.split(nnx.eval_shape(build))
    shapes = {".".join(path): leaf for path, leaf in nnx.to_flat_state(state)}
    values: dict[str, Array] = {}

    def put(items: Iterable[tuple[str, np.ndarray]]) -> None:
        for path, array in items:
            assert shapes[path].shape == array.shape, (path, shapes[path].shape, array.shape)
            wanted = array.astype(shapes[path].dtype, copy=False)
            if wanted is not array and not all_finite(wanted):
                raise UserError(
                    f"the parameter {path} in {source.directory} has values that are too large for "
                    f"{wanted.dtype}; set config.model.dtype to a wider dtype, or use another "
                    "checkpoint"
                )
            values[path] = place(path, wanted)

    put(weights.parameters())
    put(adapters.items())
    put(exits.items())
    if fresh := sorted(shapes.keys() - values.keys()):
        drawn = _fresh_trainables(build)
        put((path, np.asarray(drawn[path])) for path in fresh)
    nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(values, sep="."))
    return nnx.merge(graphdef, state), source.tokenizer()


def save_model(
    directory: str | os.PathLike[str],
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    base: str | os.PathLike[str] = "",
    with_exits: bool = True,
    overwrite: bool = False,
) -> None:
    """Writes a model directory, either completely or not at all.

    If `base` is empty or is the directory that is replaced, all parameters are stored. Otherwise
    only LoRA adapters and exit heads are stored, and the new directory refers to the model
    directory `base`, which must contain the base weights of `model`. Without `with_exits`, exit
    heads and continuation are left out. `overwrite` allows an existing directory to be replaced.
    With several hosts, all hosts must call this function, but only the primary host writes.

    Raises UserError if `base` has another architecture than `model`, or if `directory` exists, is
    not empty and `overwrite` is false.
    """
    reference, source = "", ""
    if base:
        origin = open_model(base)
        if origin.architecture != model.arch:
            raise UserError(
                f"{base} is not the base model of the model to be saved "
                f"({difference(model.arch, origin.architecture)}); give as base= the model "
                "directory from which the training started"
            )
        source = origin.source
        if origin.base.resolve() != pathlib.Path(directory).resolve():
            reference = _reference(origin.base)
    flat = {".".join(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    adapters = {path: leaf[...] for path, leaf in flat.items() if isinstance(leaf, LoRAParam)}
    exits = {path: leaf[...] for path, leaf in flat.items() if isinstance(leaf, ExitParam)}
    stored = [path for path in flat if path not in adapters and path not in exits]
    adapters, exits = whole((adapters, exits if with_exits else {}), f"writing {directory}")
    weights = (
        (path, whole(flat[path][...], f"writing {directory}"))
        for path in (() if reference else stored)
    )
    if not is_primary():
        for _ in weights:  # takes part in bringing the pieces together
            pass
        return
    with atomic_directory(directory, overwrite=overwrite) as partial:
        description = ModelSource(
            directory=partial,
            base=partial,
            architecture=model.arch,
            exit_layers=model.exit_layers,
            exit_head=model.exit_head,
            lora=model.lora,
            source=source,
        )
        write_model(description, weights, adapters, exits, lambda: tokenizer, base=reference)


def write_model(
    model: ModelSource,
    weights: Iterable[tuple[str, Array | np.ndarray]],
    adapters: Mapping[str, Array | np.ndarray],
    exits: Mapping[str, Array | np.ndarray],
    tokenizer: Callable[[], Tokenizer],
    *,
    base: str = "",
) -> None:
    """Writes the files of a model directory into `model.directory`, which must exist.

    `model` describes the model. Arrays are named by their dotted paths. If `weights` is empty,
    `base` is the path of the model directory that contains the base weights. To keep memory use
    low, the arrays of `weights` are read one at a time, and the function `tokenizer`, which loads
    the tokenizer, is called after all arrays have been written.
    """
    dtypes: dict[str, str] = {}
    parts = {"base": weights, "adapters": adapters.items(), "exits": exits.items()}
    for part, arrays in parts.items():
        store = ArrayStore(model.directory / part)
        for path, array in arrays:
            store.write(path, np.asarray(array))
            dtypes.setdefault(part, np.asarray(array).dtype.name)
            del array  # before the next one is read
    words = tokenizer()
    words.save(model.directory)
    write_eos_ids(model.directory, words)
    values = {
        "format_version": FORMAT_VERSION,
        "jexit_version": jexit.__version__,
        "architecture": model.architecture.to_dict(),
        "dtype": dtypes.get("base", ""),
        "exit_layers": model.exit_layers if exits else (),
        "exit_head": dataclasses.asdict(model.exit_head) if exits else None,
        "lora": dataclasses.asdict(model.lora) if model.lora and adapters else None,
        "base": base,
        "source": model.source,
        "eos_ids": sorted(words.eos_ids),
    }
    write_json(model.directory / MODEL_FILE, values)


def write_eos_ids(directory: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer's end-of-sequence tokens to generation_config.json in `directory`.

    In an existing file, only `eos_token_id` can change. If this entry lacks an end-of-sequence
    token other than `tokenizer.eos_id`, it is replaced by the list of all end-of-sequence tokens.
    """
    file = directory / "generation_config.json"
    values = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if file.exists():
        values = read_object(file, "copy it again from the checkpoint")
    stored = token_ids(values.get("eos_token_id"), f"{file} sets eos_token_id to")
    if not tokenizer.eos_ids <= {*stored, tokenizer.eos_id}:
        values["eos_token_id"] = sorted(tokenizer.eos_ids)
    write_json(file, values)


def _reference(base: pathlib.Path) -> str:
    """Returns the path to store for `base`: jexit/assets/... for a shipped model, else absolute."""
    shipped = pathlib.Path(jexit.__file__).parent.parent.resolve()
    base = base.resolve()
    if base.is_relative_to(shipped / "jexit" / "assets"):
        return base.relative_to(shipped).as_posix()
    return str(base)


def _base_dtype(dtype: str | jnp.dtype) -> jnp.dtype:
    if dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    try:
        wanted = jnp.dtype(dtype)
    except TypeError:
        wanted = None
    if wanted not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        raise UserError(
            f"dtype is {dtype!r}, but it must be auto, float32 or bfloat16; set config.model.dtype "
            "to one of these"
        )
    return wanted


def _exits_to_use(
    source: ModelSource, wanted: tuple[int, ...], head: ExitSettings | None
) -> tuple[tuple[int, ...], ExitSettings]:
    stored, kept, layers = source.exit_layers, source.exit_head, source.architecture.layers
    check_rising(wanted, layers)
    if not stored:
        if not wanted and 1 < layers <= 5:
            wanted = (layers // 2,)
        return check_exits(wanted, layers), head or ExitSettings()
    _check_same(source, {"exits.layers": (stored, wanted or stored)})
    if head is None:
        return stored, kept
    same = {"exit_head.kind": "kind", "exit_head.norm": "norm"}
    if kept.continuation == "linear":  # a frozen one may become linear, which starts out equal
        same |= {f"exits.{name}": name for name in ("continuation", "continuation_rank")}
    _check_same(source, {key: (getattr(kept, n), getattr(head, n)) for key, n in same.items()})
    names = [name for section in TRAINED_UNDER.values() for name in section]
    unknown = {name: getattr(kept, name) for name in names if getattr(head, name) is None}
    return stored, dataclasses.replace(head, bias=kept.bias, **unknown)


def _lora_to_use(source: ModelSource, wanted: LoRA | None) -> LoRA | None:
    stored = source.lora
    if stored is None or wanted is None:
        return stored or wanted
    pairs = {f"lora.{n}": (getattr(stored, n), getattr(wanted, n)) for n in ("rank", "alpha")}
    pairs["lora.targets"] = tuple(tuple(sorted(each.targets)) for each in (stored, wanted))
    _check_same(source, pairs)
    return dataclasses.replace(stored, dropout=wanted.dropout)


def _check_same(source: ModelSource, pairs: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises UserError for the first setting in `pairs` whose (stored, requested) values differ."""
    for key, (stored, wanted) in pairs.items():
        if stored != wanted:
            raise UserError(
                f"config.{key} is {wanted}, but {source.directory} has {key}={stored}; set "
                f"config.{key} to {stored}, or start from the base model"
            )


def _fresh_trainables(build: Callable[[], Transformer]) -> dict[str, Array]:
    """Returns newly initialised adapters and exit heads by dotted path, but no base weights."""

    @jax.jit
    def trainables() -> nnx.State:
        return nnx.state(build(), nnx.Any(LoRAParam, ExitParam))

    return {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(trainables())}
