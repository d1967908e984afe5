"""Loading and saving of model directories."""

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
    """Loads the model and tokenizer of a model directory (kinds: see `jexit.io.model_source`).

    `dtype` is that of the base weights: "auto" means float32 on CPUs and bfloat16 on accelerators;
    adapters and exit heads are always float32. Without `exit_layers`, `exit_head` and `lora`, the
    model is what the directory holds. A directory without exit heads gets new ones (at every 5th
    layer, or in the middle of a model of at most 5 layers). With `lora`, a directory without
    adapters gets new ones, drawn from `seed`. `place` puts a parameter (dotted path, array in its
    final dtype) on devices; by default the first one.

    Raises UserError when the directory's heads or adapters differ from those asked for, or when its
    files are damaged; MissingFile when there is no model or no tokenizer.
    """
    source = open_model(directory)
    # Before anything of their size is made: what is described must be there.
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
                    f"{path} of {source.directory} is too large for {wanted.dtype}; load it in a "
                    "wider dtype (config.model.dtype), or take another checkpoint"
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

    With `base`, the model path that the (unchanged) base weights come from, only adapters and
    exit heads are stored and the directory refers to the weights where they are; without it, or
    when they are in the directory to replace, everything is stored. Without
    `with_exits` the heads stay out: the directory holds a plain trunk. `overwrite` replaces a
    directory that exists. With several hosts all must call, and the primary one writes. Raises
    ValueError when it exists otherwise, or when `base` is another model.
    """
    reference, source = "", ""
    if base:
        origin = open_model(base)
        if origin.architecture != model.arch:
            raise UserError(
                f"{base} is not the base of the model to save: their architectures differ"
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
    """Writes the files of a model directory, `model.directory`, which exists; `base` is another.

    Weights come one at a time. The tokenizer is read after them, which keeps memory low.
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
    """Makes generation_config.json name every end token, where it does not already."""
    file = directory / "generation_config.json"
    values = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if file.exists():
        values = read_object(file, "copy it again from the checkpoint")
    if not tokenizer.eos_ids <= {*token_ids(values.get("eos_token_id")), tokenizer.eos_id}:
        values["eos_token_id"] = sorted(tokenizer.eos_ids)
    write_json(file, values)


def _reference(base: pathlib.Path) -> str:
    """How a directory refers to its base: absolute, but a shipped model by its name."""
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
        raise UserError(f"dtype is {dtype!r}; choose auto, float32 or bfloat16")
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
    # A frozen continuation may become a linear one, which begins as the same; no other change.
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
    """Raises UserError where a setting that the directory has differs from the one asked for."""
    for key, (stored, wanted) in pairs.items():
        if stored != wanted:
            raise UserError(
                f"{source.directory} has {key}={stored}, not {wanted}; set config.{key} to what it "
                "has, or start from the base model"
            )


def _fresh_trainables(build: Callable[[], Transformer]) -> dict[str, Array]:
    """Initial adapters and heads of `build`; under jit its base weights are never computed."""

    @jax.jit
    def trainables() -> nnx.State:
        return nnx.state(build(), nnx.Any(LoRAParam, ExitParam))

    return {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(trainables())}
