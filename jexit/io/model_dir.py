"""Loads and saves model directories."""

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
from jexit.config import Execution, ExitSettings, LoRA, check_exits
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
    check_rising,
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
    """Loads the model and the tokenizer of a model directory (its kinds: `jexit.io.model_source`).

    `dtype` is the dtype of the base weights. "auto" means float32 on CPUs and bfloat16 on
    accelerators. Adapters and exit heads are always float32. Without `exit_layers`, `exit_head` and
    `lora`, the model has the exit heads and the adapters of the directory. If the directory has no
    exit heads, the model gets new ones (by default at every 5th layer, or in the middle of a model
    of at most 5 layers). With `lora`, a model without adapters gets new ones. New parameters are
    drawn from `seed`. `place` puts a parameter (its dotted path, and its array in the final dtype)
    on devices; by default on the first device.

    Raises UserError if the directory's exit heads or adapters differ from the requested ones, or if
    its files are damaged. Raises MissingFile if the model or the tokenizer is missing.
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
    """Writes a model directory, whole or not at all.

    `base` is the model path of the base weights, which must be unchanged. If it is given, only
    adapters and exit heads are stored, and the directory refers to the base for the weights.
    Without `base`, or if the base weights are in the directory that is replaced, everything is
    stored. Without `with_exits`, the exit heads are left out, so the directory contains a plain
    trunk. `overwrite` replaces an existing directory. With several hosts, all must call this
    function, and the primary host writes. Raises UserError if `base` has another architecture, or
    if the directory exists and `overwrite` is false.
    """
    reference, source = "", ""
    if base:
        origin = open_model(base)
        if origin.architecture != model.arch:
            raise UserError(
                f"{base} is not the base of the model to save, because their architectures differ; "
                "set the base to the model that was trained"
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

    `base` is the path of another directory that contains the base weights, if they are not stored
    here. The weights are read one at a time, and the tokenizer after them, which keeps memory use
    low.
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
    """Writes generation_config.json, or adds the end tokens that an existing one lacks.

    An existing file keeps its values. Only its `eos_token_id` becomes the list of all end tokens,
    if it lacks one other than the tokenizer's own.
    """
    file = directory / "generation_config.json"
    values = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if file.exists():
        values = read_object(file, "copy it again from the checkpoint")
    if not tokenizer.eos_ids <= {*token_ids(values.get("eos_token_id")), tokenizer.eos_id}:
        values["eos_token_id"] = sorted(tokenizer.eos_ids)
    write_json(file, values)


def _reference(base: pathlib.Path) -> str:
    """Returns the path by which a model directory refers to its base.

    It is absolute, except for a model shipped with jexit, which is named as `jexit/assets/...`.
    """
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
    check_rising(wanted, layers, "config.exits.layers is")
    if not stored:
        if not wanted and 1 < layers <= 5:
            wanted = (layers // 2,)
        return check_exits(wanted, layers), head or ExitSettings()
    if wanted:
        _check_same(source, {"exits.layers": (stored, wanted)})
    if head is None:
        return stored, kept
    # A frozen continuation may become a linear one, which starts out equal to it. Nothing else may
    # change.
    same = {"exit_head": ("kind", "norm")}
    same["exits"] = ("continuation", "continuation_rank") if kept.continuation == "linear" else ()
    for section, names in same.items():
        pairs = {f"{section}.{n}": (getattr(kept, n), getattr(head, n)) for n in names}
        _check_same(source, pairs)
    return stored, dataclasses.replace(head, bias=kept.bias)


def _lora_to_use(source: ModelSource, wanted: LoRA | None) -> LoRA | None:
    stored = source.lora
    if stored is None or wanted is None:
        return stored or wanted
    pairs = {f"lora.{n}": (getattr(stored, n), getattr(wanted, n)) for n in ("rank", "alpha")}
    pairs["lora.targets"] = tuple(tuple(sorted(each.targets)) for each in (stored, wanted))
    _check_same(source, pairs)
    return dataclasses.replace(stored, dropout=wanted.dropout)


def _check_same(source: ModelSource, pairs: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises UserError if a setting of the directory differs from the requested one."""
    for key, (stored, wanted) in pairs.items():
        if stored != wanted:
            raise UserError(
                f"config.{key} is {wanted}, but {source.directory} has {key}={stored}; set "
                f"config.{key} to {stored}, or start from the base model"
            )


def _fresh_trainables(build: Callable[[], Transformer]) -> dict[str, Array]:
    """Returns the initial adapters and exit heads of the model that `build` makes.

    They are computed under jit, which skips the base weights because nothing uses them.
    """

    @jax.jit
    def trainables() -> nnx.State:
        return nnx.state(build(), nnx.Any(LoRAParam, ExitParam))

    return {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(trainables())}
