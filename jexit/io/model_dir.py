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
from flax import nnx

import jexit
from jexit.axes import Array
from jexit.config import Execution, ExitSettings, LoRA, check_exits
from jexit.data.tokenizer import Tokenizer, token_ids
from jexit.dist import is_primary, whole
from jexit.errors import UserError
from jexit.io.array_store import ArrayStore
from jexit.io.atomic import atomic_directory
from jexit.io.files import write_json
from jexit.io.finite import all_finite
from jexit.io.model_source import FORMAT_VERSION, MODEL_FILE, ModelSource, open_model
from jexit.model.exits import ExitParam
from jexit.model.lora import LoRAParam
from jexit.model.transformer import Transformer
from jexit.presets import Architecture
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
    place: Place | None = None,
) -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer of a model directory (see `jexit.io.model_source` for the kinds).

    `dtype` is that of the base weights: "auto" means float32 on CPU and bfloat16 on accelerators;
    adapters and exit heads are float32. Without `exit_layers`, `exit_head` and `lora` the model is
    what the directory holds; a directory without heads gets fresh ones (at every 5th layer, or half
    way up a model of at most 5) and, when `lora` is given, one without adapters gets fresh
    adapters, drawn from `seed`. `place` puts a parameter (dotted path, array in its final dtype) on
    devices; by default the first one.

    Raises UserError when the directory's heads or adapters are not the ones asked for, or when its
    files are damaged; MissingFile when there is no model or no tokenizer.
    """
    source = open_model(directory)
    settings = {"dtype": dtype, "exit_layers": exit_layers, "exit_head": exit_head, "lora": lora}
    settings |= {"execution": execution, "seed": seed, "place": place}
    return load_source(source, **settings), source.tokenizer()


def load_source(
    source: ModelSource,
    *,
    dtype: str | jnp.dtype = "auto",
    exit_layers: tuple[int, ...] = (),
    exit_head: ExitSettings | None = None,
    lora: LoRA | None = None,
    execution: Execution = Execution(),
    seed: int = 0,
    place: Place | None = None,
) -> Transformer:
    """`load` for a directory that is open already, without its tokenizer."""
    place = place or (lambda path, array: jnp.asarray(array))
    base_dtype = _base_dtype(dtype)
    # Before anything of their size is made: what is described must be there.
    weights, adapters, exits = source.weights(), source.adapters(), source.exits()
    arch = source.architecture
    layers, head = _exits_to_use(source, tuple(exit_layers), exit_head)
    adapter = _lora_to_use(source, lora)

    def build() -> Transformer:
        return Transformer(
            arch,
            exit_layers=layers,
            exit_head=head,
            lora=adapter,
            dtype=base_dtype,
            execution=execution,
            rngs=nnx.Rngs(seed),
        )

    abstract = nnx.eval_shape(build)
    graphdef, state = nnx.split(abstract)
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
    if fresh := sorted(set(shapes) - set(values)):
        assert all(_is_fresh(path, source) for path in fresh), fresh
        drawn = _fresh_trainables(build)
        put((path, np.asarray(drawn[path])) for path in fresh)
    nnx.replace_by_pure_dict(state, _nested(values))
    return nnx.merge(graphdef, state)


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
    weights = {p: leaf[...] for p, leaf in flat.items() if p not in adapters and p not in exits}
    exits = exits if with_exits else {}
    adapters, exits = whole((adapters, exits), f"writing {directory}")
    stored_weights = (
        (path, whole(leaf, f"writing {directory}"))
        for path, leaf in weights.items()
        if not reference
    )
    if not is_primary():
        for _ in stored_weights:  # takes part in bringing the pieces together
            pass
        return
    with atomic_directory(directory, overwrite=overwrite) as partial:
        write_model(
            partial,
            model.arch,
            weights=stored_weights,
            adapters=adapters,
            exits=exits,
            exit_layers=model.exit_layers,
            exit_head=model.exit_head,
            lora=model.lora,
            tokenizer=tokenizer,
            base=reference,
            source=source,
        )


def write_model(
    directory: pathlib.Path,
    arch: Architecture,
    *,
    weights: Iterable[tuple[str, Array | np.ndarray]],
    adapters: Mapping[str, Array | np.ndarray],
    exits: Mapping[str, Array | np.ndarray],
    exit_layers: tuple[int, ...],
    exit_head: ExitSettings,
    lora: LoRA | None,
    tokenizer: Tokenizer | Callable[[], Tokenizer],
    base: str = "",
    source: str = "",
) -> None:
    """Writes the files of a model directory into an existing one; `weights` come one at a time.

    A tokenizer to be called for is read after the weights are done, which keeps memory low.
    """
    dtype = ""
    store = ArrayStore(directory / "base")
    for path, array in weights:
        store.write(path, np.asarray(array))
        dtype = dtype or np.asarray(array).dtype.name
        del array  # before the next one is read
    for part, arrays in (("adapters", adapters), ("exits", exits)):
        store = ArrayStore(directory / part)
        for path, array in arrays.items():
            store.write(path, np.asarray(array))
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = tokenizer()
    tokenizer.save(directory)
    write_eos_ids(directory, tokenizer)
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "jexit_version": jexit.__version__,
        "architecture": arch.to_dict(),
        "dtype": dtype,
        "exit_layers": list(exit_layers) if exits else [],
        "exit_head": dataclasses.asdict(exit_head) if exits else None,
        "lora": dataclasses.asdict(lora) if lora and adapters else None,
        "base": base,
        "source": source,
        "eos_ids": sorted(tokenizer.eos_ids),
    }
    write_json(directory / MODEL_FILE, values)


def write_eos_ids(directory: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Makes generation_config.json name every end token, where it does not already."""
    file = directory / "generation_config.json"
    values = read_object(file, "copy it again from the checkpoint") if file.exists() else {}
    named = set(token_ids(values.get("eos_token_id")))
    if not tokenizer.eos_ids <= named | {tokenizer.eos_id}:
        ends = sorted(tokenizer.eos_ids)
        values["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if not file.exists():
        values.setdefault("eos_token_id", tokenizer.eos_id)
        values["pad_token_id"] = tokenizer.pad_id
        write_json(file, values)
    elif not tokenizer.eos_ids <= named | {tokenizer.eos_id}:
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
    stored, layers = source.exit_layers, source.architecture.layers
    if list(wanted) != sorted(set(wanted)) or (wanted and wanted[0] < 1):
        raise UserError(
            f"exit_layers is {wanted}; exits are distinct layer numbers from 1 upwards in rising "
            "order, such as (5, 10, 15)"
        )
    if wanted:
        check_exits(wanted, layers)
    if stored:
        if wanted and wanted != stored:
            raise UserError(
                f"{source.directory} has exit heads at {stored}, not at {wanted}; leave "
                "exits.layers empty to use them, or start from the base model"
            )
        kept = source.exit_head
        if head is not None and (head.kind, head.norm) != (kept.kind, kept.norm):
            raise UserError(
                f"{source.directory} has exit heads of kind {kept.kind} with norm {kept.norm}, not "
                f"{head.kind} with {head.norm}; set exit_head to the stored ones, or start from "
                "the base model"
            )
        if head is None:
            return stored, kept
        taken = _continuation_to_use(source, head) | {"detached": head.detached}
        return stored, dataclasses.replace(kept, **taken)
    if not wanted and 1 < layers <= 5:
        wanted = (layers // 2,)
    return check_exits(wanted, layers), head or ExitSettings()


def _continuation_to_use(source: ModelSource, wanted: ExitSettings) -> dict[str, Any]:
    """A frozen continuation may become a linear one, which begins as the same; no other change."""
    kept = source.exit_head
    names = ("continuation", "continuation_rank")
    if kept.continuation == "linear" and any(getattr(wanted, n) != getattr(kept, n) for n in names):
        raise UserError(
            f"{source.directory} has a linear continuation of rank {kept.continuation_rank} and "
            f"not {wanted.continuation} of rank {wanted.continuation_rank}; set "
            f"exits.continuation=linear and exits.continuation_rank={kept.continuation_rank}, or "
            "start from the base model"
        )
    return {name: getattr(wanted, name) for name in names}


def _lora_to_use(source: ModelSource, wanted: LoRA | None) -> LoRA | None:
    stored = source.lora
    if stored is None or wanted is None:
        return stored or wanted
    same = (
        stored.rank == wanted.rank
        and stored.alpha == wanted.alpha
        and set(stored.targets) == set(wanted.targets)
    )
    if not same:
        raise UserError(
            f"{source.directory} has adapters of rank {stored.rank} and alpha {stored.alpha:g} on "
            f"{', '.join(stored.targets)}, not rank {wanted.rank} and alpha {wanted.alpha:g} on "
            f"{', '.join(wanted.targets)}; set lora to the stored, or start from the base model"
        )
    return dataclasses.replace(stored, dropout=wanted.dropout)


def _is_fresh(path: str, source: ModelSource) -> bool:
    """Whether a parameter that the directory lacks may be drawn anew."""
    if path.startswith("exits."):
        return not source.exit_layers
    if path.startswith("blocks.continuation."):
        return not source.exit_layers or source.exit_head.continuation == "frozen"
    return path.endswith((".lora_a", ".lora_b")) and source.lora is None


def _fresh_trainables(build: Callable[[], Transformer]) -> dict[str, Array]:
    """Initial adapters and heads of `build`; under jit its base weights are never computed."""

    @jax.jit
    def trainables() -> nnx.State:
        return nnx.state(build(), nnx.Any(LoRAParam, ExitParam))

    return {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(trainables())}


def _nested(values: Mapping[str, Array]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
