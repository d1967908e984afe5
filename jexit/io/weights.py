"""Weights on disk, in jexit's own format or in Hugging Face's safetensors.

Each parameter is named by its dotted path (`blocks.attn.q.kernel`). A parameter of the layers (or
exits) is one array that stacks all layers (or exits) along its first axis. `convert.names` defines
which tensors of a safetensors file form each parameter. In either format, opening the files checks
every name and shape against the model's configuration, and reads no arrays, with one exception: if
a model with tied embeddings also stores an output head, the head is compared with the embeddings.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np

from convert import names
from convert.names import Rule
from jexit.config import ExitSettings, LoRA
from jexit.errors import MissingFile, UserError
from jexit.io.array_store import ArrayStore
from jexit.io.tensor_files import Spec, TensorReader, TensorWriter
from jexit.presets import Architecture

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a model that is stored separately: the base weights, the adapters or the exits.

    In jexit's format, a part is stored in the directory `folder`. In Hugging Face's format, it is
    stored in the file `STEM.safetensors`, where STEM is the field `stem`. `stacks` contains pairs
    (rules, numbers): each rule maps one parameter to the tensors of the layers or exits with these
    numbers. `sizes` maps each axis letter to the length of the axis.
    """

    folder: str
    stem: str
    stacks: Sequence[tuple[Sequence[Rule], Sequence[int]]]
    sizes: Mapping[str, int]

    def rules(self) -> Iterator[tuple[Rule, list[str]]]:
        """Yields (conversion rule, tensor names) for each parameter that the part contains."""
        for rules, numbers in self.stacks:
            for rule in rules:
                stacked = numbers if rule.stacked else (None,)
                yield rule, [rule.name_at(number) for number in stacked]

    def shapes(self) -> Shapes:
        """Returns each parameter's shape by dotted path; stacked layers are the first axis."""
        return {
            rule.path: (*([len(numbers)] if rule.stacked else []), *rule.shape(self.sizes))
            for rules, numbers in self.stacks
            for rule in rules
        }


def base_part(arch: Architecture) -> Part:
    return Part(
        folder="base",
        stem="model",
        stacks=[(names.base_rules(arch.family, arch.tied), range(arch.layers))],
        sizes=names.axis_sizes(**arch.to_dict()),
    )


def adapter_part(arch: Architecture, lora: LoRA) -> Part:
    return Part(
        folder="adapters",
        stem="adapter_model",
        stacks=[(names.adapter_rules(lora.targets), range(arch.layers))],
        sizes=names.axis_sizes(**arch.to_dict(), rank=lora.rank),
    )


def exit_part(arch: Architecture, layers: tuple[int, ...], head: ExitSettings) -> Part:
    """Returns the part that contains the exit heads and the continuation.

    The head of layer ℓ in `layers` reads the residual h that enters decoder layer ℓ, counted from
    0, and computes the exit probability `hazard = sigmoid(out(relu(hidden(norm(h)))))`, without
    `hidden` and relu if the head is linear. For a token that has exited, the continuation replaces
    each remaining layer: h becomes `h + update(h)`, or with a continuation_rank `h +
    update(reduce(h))`. A frozen continuation leaves h unchanged and has no tensors.
    """
    head.check_width(arch.width)
    stacks = [(names.exit_rules(head.kind, head.norm), layers)]
    if head.continuation == "linear":
        stacks.append((names.continuation_rules(head.continuation_rank), range(arch.layers)))
    return Part(
        folder="exits",
        stem="exit_heads",
        stacks=stacks,
        sizes=names.axis_sizes(
            **arch.to_dict(),
            exit_width=2 * arch.width if head.kind == "mlp" else arch.width,
            continuation_rank=head.continuation_rank,
        ),
    )


FOLDERS = ("base", "adapters", "exits")


class StoredArrays:
    """One part of a model, read from a directory in jexit's own format.

    Raises MissingFile if the directory does not contain the part, and UserError if names or shapes
    differ from those in `part`.
    """

    def __init__(self, directory: pathlib.Path, part: Part):
        self._store = ArrayStore(directory / part.folder)
        self._specs = {name: self._store.spec(name) for name in self._store.names()}
        if not self._specs:
            what = "weights" if part.folder == "base" else part.folder
            raise MissingFile(
                f"{directory} does not contain its {what} ({part.folder}/); convert or copy the "
                "model again"
            )
        found = {name: spec.shape for name, spec in self._specs.items()}
        _check_shapes(self._store.directory, found, part.shapes())

    def dtypes(self) -> dict[str, np.dtype]:
        return {name: spec.dtype for name, spec in self._specs.items()}

    def parameters(self) -> Iterator[tuple[str, np.ndarray]]:
        # The largest first: memory then peaks while few other parameters are in place.
        for name in sorted(self._specs, key=lambda name: -self._specs[name].bytes):
            yield name, self._store.read(name)


class Safetensors:
    """One part of a model, read from safetensors files in a Hugging Face directory.

    Raises MissingFile if files are missing, and UserError if a file cannot be read. If tensors are
    missing, surplus or of the wrong shape, one UserError lists them all.
    """

    def __init__(self, directory: pathlib.Path, part: Part):
        self.directory, self._part = pathlib.Path(directory), part
        self._reader = TensorReader(self.directory, part.stem)
        found = {
            name: spec.shape
            for name, spec in self._reader.specs.items()
            if not name.endswith(names.IGNORED_SUFFIXES)
        }
        most = max(len(numbers) for _, numbers in part.stacks)
        if most > len(found):  # a forged number of layers may be too large to count to
            raise UserError(
                f"the configuration of {directory} describes {most} layers, but its weights have "
                f"only {len(found)} tensors; use the configuration and the weights of one "
                "checkpoint"
            )
        expected = {
            name: rule.file_shape(part.sizes) for rule, tensors in part.rules() for name in tensors
        }
        repeated = part.folder == "base" and names.TIED_HEAD in found.keys() - expected.keys()
        if repeated:
            expected[names.TIED_HEAD] = (part.sizes["V"], part.sizes["D"])
        _check_shapes(self.directory, found, expected)
        if repeated:
            self._check_tied_head()

    def dtypes(self) -> dict[str, np.dtype]:
        """Returns each parameter's dtype by dotted path; if layers differ, the promoted dtype."""
        specs = self._reader.specs
        return {
            rule.path: functools.reduce(jnp.promote_types, (specs[n].dtype for n in tensors))
            for rule, tensors in self._part.rules()
        }

    def parameters(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the dotted path and the stacked array of every parameter, read one at a time."""
        dtypes, sizes = self.dtypes(), self._part.sizes
        for rule, tensors in self._part.rules():
            if not rule.stacked:
                yield rule.path, rule.to_jexit(self._reader.read(rule.name), sizes)
                continue
            stacked = np.empty((len(tensors), *rule.shape(sizes)), dtypes[rule.path])
            for index, name in enumerate(tensors):
                stacked[index] = rule.to_jexit(self._reader.read(name), sizes)
            yield rule.path, stacked
            del stacked  # before the next one is made

    def _check_tied_head(self) -> None:
        embedding = self._reader.read("model.embed_tokens.weight")
        if not np.array_equal(embedding, self._reader.read(names.TIED_HEAD)):
            raise UserError(
                f"{self.directory}/config.json sets tie_word_embeddings, but {names.TIED_HEAD} "
                "differs from the embeddings; set tie_word_embeddings to false if the head is "
                "separate, and otherwise copy the weights again"
            )


Weights: TypeAlias = StoredArrays | Safetensors


def write_safetensors(
    directory: pathlib.Path,
    part: Part,
    dtypes: Mapping[str, np.dtype],
    parameters: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes one part of a model as safetensors files into `directory`.

    `parameters` yields the dotted path and the stacked array of each parameter, and is read one
    parameter at a time to save memory. `dtypes` contains the dtype of each array, by path.
    """
    rules = {rule.path: (rule, tensors) for rule, tensors in part.rules()}
    specs = {
        name: Spec(rule.file_shape(part.sizes), np.dtype(dtypes[path]))
        for path, (rule, tensors) in rules.items()
        for name in tensors
    }
    with TensorWriter(directory, specs, stem=part.stem) as writer:
        for path, array in parameters:
            rule, tensors = rules[path]
            for name, tensor in zip(tensors, array if rule.stacked else [array], strict=True):
                writer.write(name, rule.to_hf(tensor, part.sizes))
            del array, tensor  # before the next one is read


def _check_shapes(directory: pathlib.Path, found: Shapes, expected: Shapes) -> None:
    """Raises one UserError that lists all missing, surplus and misshapen tensors, if any."""
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    misshapen = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    differing = {"missing": missing, "surplus": surplus, "misshapen": misshapen}
    if parts := [f"{kind} {', '.join(names)}" for kind, names in differing.items() if names]:
        raise UserError(
            f"the tensors in {directory} do not match its configuration ({'; '.join(parts)}); use "
            "the configuration and the weights of one checkpoint"
        )
