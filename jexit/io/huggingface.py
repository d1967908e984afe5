"""Hugging Face model directories: base weights, PEFT adapters and exit heads, read and written.

Parameters are dotted paths (`blocks.attn.q.kernel`) with their layers stacked; which tensor of a
file each comes from is said in `convert.names`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from convert import names
from jexit.config import PROJECTIONS
from jexit.io.hf_config import positive, write_json
from jexit.io.tensor_files import Spec, TensorReader, TensorWriter, write_tensors
from jexit.model.exits import ExitSettings
from jexit.model.lora import LoRA
from jexit.presets import Architecture
from jexit.untrusted import read_object

Shapes = Mapping[str, tuple[int, ...]]
Stacks = Sequence[tuple[tuple[names.Rule, ...], Sequence[int]]]  # rules, numbers of their tensors

ADAPTER_CONFIG = "adapter_config.json"
EXIT_CONFIG = "exit_heads.json"
_ADAPTER_STEM = "adapter_model"
_EXIT_STEM = "exit_heads"
_EXIT_FORMAT = 1


class HFWeights:
    """The base weights of a Hugging Face directory, checked name by name when it is opened.

    Raises ValueError that lists every missing, surplus and misshapen tensor at once, or says why
    the files cannot be read.
    """

    def __init__(self, directory: pathlib.Path, arch: Architecture):
        self.directory, self.arch = pathlib.Path(directory), arch
        self._reader = TensorReader(self.directory)
        self._rules = names.base_rules(arch.family, arch.tied)
        self._sizes = names.axis_sizes(**arch.to_dict())
        stacks = [(self._rules, range(arch.layers))]
        _check(self._reader, stacks, self._sizes, tied=arch.tied)
        if arch.tied and names.TIED_HEAD in self._reader.specs:
            self._check_tied_head()

    def dtypes(self) -> dict[str, np.dtype]:
        """Each parameter's dtype in the files; the wider one where layers differ."""
        return {
            rule.path: _common_dtype(
                self._reader.specs[rule.name_at(layer)].dtype for layer in self._layers(rule)
            )
            for rule in self._rules
        }

    def parameters(self) -> Iterator[tuple[str, np.ndarray]]:
        """Path and stacked array of every parameter, one at a time, in the files' dtype."""
        dtypes = self.dtypes()
        for rule in self._rules:
            yield rule.path, self._parameter(rule, dtypes[rule.path])

    def _parameter(self, rule: names.Rule, dtype: np.dtype) -> np.ndarray:
        if not rule.stacked:
            return rule.to_jexit(self._reader.read(rule.name), self._sizes)
        stacked = np.empty((self.arch.layers, *rule.shape(self._sizes)), dtype)
        for layer in range(self.arch.layers):
            tensor = self._reader.read(rule.name_at(layer))
            stacked[layer] = rule.to_jexit(tensor, self._sizes)
        return stacked

    def _layers(self, rule: names.Rule) -> Iterable[int | None]:
        return range(self.arch.layers) if rule.stacked else (None,)

    def _check_tied_head(self) -> None:
        embedding = self._reader.read("model.embed_tokens.weight")
        head = self._reader.read(names.TIED_HEAD)
        if not np.array_equal(embedding, head):
            raise ValueError(
                f"{self.directory} ties its embeddings (tie_word_embeddings) but stores another "
                f"{names.TIED_HEAD}; set tie_word_embeddings to false in its config.json if the "
                "head is meant to differ"
            )


def write_weights(
    directory: pathlib.Path,
    arch: Architecture,
    dtypes: Mapping[str, np.dtype],
    parameters: Iterable[tuple[str, np.ndarray]],
    **options: Any,
) -> None:
    """Writes base weights as safetensors; `parameters` come one at a time, in `dtypes`."""
    rules = {rule.path: rule for rule in names.base_rules(arch.family, arch.tied)}
    sizes = names.axis_sizes(**arch.to_dict())
    specs = {}
    for rule in rules.values():
        for layer in range(arch.layers) if rule.stacked else (None,):
            specs[rule.name_at(layer)] = Spec(rule.file_shape(sizes), np.dtype(dtypes[rule.path]))
    with TensorWriter(directory, specs, **options) as writer:
        for path, array in parameters:
            rule = rules[path]
            if not rule.stacked:
                writer.write(rule.name, rule.to_hf(array, sizes))
            else:
                for layer in range(arch.layers):
                    writer.write(rule.name_at(layer), rule.to_hf(array[layer], sizes))
            del array  # before the next one is read


def read_adapter_config(directory: pathlib.Path) -> tuple[LoRA, str]:
    """LoRA settings and the base model's name or path from adapter_config.json.

    Raises ValueError for an adapter that is more than plain LoRA on whole projections.
    """
    file = directory / ADAPTER_CONFIG
    config = read_object(file, "copy it again")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file} describes {config.get('peft_type')!r}; jexit reads LORA adapters")
    extras = (
        "alora_invocation_tokens",
        "alpha_pattern",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "layer_replication",
        "layers_pattern",
        "layers_to_transform",
        "lora_bias",
        "megatron_config",
        "modules_to_save",
        "rank_pattern",
        "target_parameters",
        "trainable_token_indices",
        "use_dora",
        "use_qalora",
        "use_rslora",
    )
    used = [key for key in extras if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if config.get("fan_in_fan_out"):
        used.append("fan_in_fan_out")
    if used:
        raise ValueError(
            f"{file} uses {', '.join(used)}; jexit reads plain LoRA on whole projections only"
        )
    modules = config.get("target_modules")
    if modules == "all-linear":
        modules = list(names.TARGET_OF_MODULE)
    known = list(names.TARGET_OF_MODULE)  # a list: what is looked up may not be hashable
    if not isinstance(modules, list) or not modules or any(m not in known for m in modules):
        raise ValueError(
            f"{file} adapts {modules!r}; jexit knows {', '.join(names.TARGET_OF_MODULE)}"
        )
    targets = {names.TARGET_OF_MODULE[module] for module in modules}
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
        raise ValueError(f"{file} sets lora_dropout to {dropout!r}; it is a probability below 1")
    lora = LoRA(
        rank=positive(config, "r", str(file), whole=True),
        alpha=positive(config, "lora_alpha", str(file)),
        dropout=float(dropout),
        targets=tuple(name for name in PROJECTIONS if name in targets),
    )
    base = config.get("base_model_name_or_path") or ""
    if not isinstance(base, str):
        raise ValueError(f"{file} names {base!r} as its base, which is no text; copy it again")
    return lora, base


def read_adapters(directory: pathlib.Path, arch: Architecture, lora: LoRA) -> dict[str, np.ndarray]:
    """LoRA parameters by path, float32; checked like base weights."""
    sizes = names.axis_sizes(**arch.to_dict(), rank=lora.rank)
    stacks = [(names.adapter_rules(lora.targets), range(arch.layers))]
    return _read_stacked(directory, _ADAPTER_STEM, stacks, sizes)


def write_adapters(
    directory: pathlib.Path,
    arch: Architecture,
    lora: LoRA,
    parameters: Mapping[str, np.ndarray],
    *,
    base: str,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors for `peft`."""
    sizes = names.axis_sizes(**arch.to_dict(), rank=lora.rank)
    rules = names.adapter_rules(lora.targets)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [names.MODULE_OF_TARGET[target] for target in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(directory / ADAPTER_CONFIG, config)
    stacks = [(rules, range(arch.layers))]
    _write_stacked(directory, _ADAPTER_STEM, stacks, sizes, parameters)


def read_exit_config(directory: pathlib.Path) -> tuple[tuple[int, ...], ExitSettings]:
    """Exit layers and head settings from exit_heads.json."""
    file = directory / EXIT_CONFIG
    config = read_object(file, "copy it again")
    if config.get("format_version") != _EXIT_FORMAT:
        raise ValueError(
            f"{file} has format version {config.get('format_version')!r}; this jexit reads "
            f"{_EXIT_FORMAT}: export the exit heads again with it"
        )
    layers, kind, norm = (config.get(key) for key in ("exit_layers", "kind", "norm"))
    if not isinstance(layers, list) or kind not in ("mlp", "linear") or norm not in ("rms", "none"):
        raise ValueError(
            f"{file} describes heads of kind {kind!r} with norm {norm!r} at {layers!r}; kind is "
            "mlp or linear, norm rms or none, exit_layers a list: export the exit heads again"
        )
    try:
        return tuple(layers), ExitSettings(
            kind=kind,
            norm=norm,
            continuation=config.get("continuation", "frozen"),
            continuation_rank=config.get("continuation_rank", 0),
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}; export the exit heads again") from error


def read_exits(
    directory: pathlib.Path, arch: Architecture, layers: tuple[int, ...], head: ExitSettings
) -> dict[str, np.ndarray]:
    """Parameters of heads and continuation by path, float32; checked like base weights."""
    stacks = _exit_stacks(arch, layers, head)
    return _read_stacked(directory, _EXIT_STEM, stacks, _exit_sizes(arch, head))


def write_exits(
    directory: pathlib.Path,
    arch: Architecture,
    layers: tuple[int, ...],
    head: ExitSettings,
    parameters: Mapping[str, np.ndarray],
) -> None:
    """Writes exit_heads.json and exit_heads.safetensors.

    Head ℓ reads the residual entering decoder layer ℓ: hazard = sigmoid(out(relu(hidden(norm)))).
    A token that has left takes its residual h past layer m as h + update(h), or as
    h + update(reduce(h)) with a continuation_rank; a frozen continuation has no tensors.
    """
    config = {
        "format_version": _EXIT_FORMAT,
        "exit_layers": list(layers),
        "kind": head.kind,
        "norm": head.norm,
        "continuation": head.continuation,
        "continuation_rank": head.continuation_rank,
        "rms_norm_eps": arch.rms_norm_eps,
    }
    write_json(directory / EXIT_CONFIG, config)
    stacks = _exit_stacks(arch, layers, head)
    _write_stacked(directory, _EXIT_STEM, stacks, _exit_sizes(arch, head), parameters)


def base_shapes(arch: Architecture) -> Shapes:
    """The shape of every base parameter by path."""
    rules = names.base_rules(arch.family, arch.tied)
    return _parameter_shapes(rules, names.axis_sizes(**arch.to_dict()), arch.layers)


def adapter_shapes(arch: Architecture, lora: LoRA) -> Shapes:
    """The shape of every LoRA parameter by path."""
    sizes = names.axis_sizes(**arch.to_dict(), rank=lora.rank)
    return _parameter_shapes(names.adapter_rules(lora.targets), sizes, arch.layers)


def exit_shapes(arch: Architecture, layers: tuple[int, ...], head: ExitSettings) -> Shapes:
    """The shape of every parameter of heads and continuation by path."""
    sizes = _exit_sizes(arch, head)
    shapes: dict[str, tuple[int, ...]] = {}
    for rules, numbers in _exit_stacks(arch, layers, head):
        shapes |= _parameter_shapes(rules, sizes, len(numbers))
    return shapes


def _parameter_shapes(
    rules: tuple[names.Rule, ...], sizes: Mapping[str, int], stacked: int
) -> Shapes:
    return {rule.path: (*([stacked] if rule.stacked else []), *rule.shape(sizes)) for rule in rules}


def _exit_sizes(arch: Architecture, head: ExitSettings) -> dict[str, int]:
    head.check_width(arch.width)
    width = 2 * arch.width if head.kind == "mlp" else arch.width
    return names.axis_sizes(
        **arch.to_dict(), exit_width=width, continuation_rank=head.continuation_rank
    )


def _exit_stacks(arch: Architecture, layers: tuple[int, ...], head: ExitSettings) -> Stacks:
    heads = (names.exit_rules(head.kind, head.norm), layers)
    if head.continuation == "frozen":
        return [heads]
    return [heads, (names.continuation_rules(head.continuation_rank), range(arch.layers))]


def _read_stacked(
    directory: pathlib.Path, stem: str, stacks: Stacks, sizes: Mapping[str, int]
) -> dict[str, np.ndarray]:
    reader = TensorReader(directory, stem)
    _check(reader, stacks, sizes, tied=False)
    return {
        rule.path: np.stack(
            [
                rule.to_jexit(reader.read(rule.name_at(number)), sizes).astype(np.float32)
                for number in numbers
            ]
        )
        for rules, numbers in stacks
        for rule in rules
    }


def _write_stacked(
    directory: pathlib.Path,
    stem: str,
    stacks: Stacks,
    sizes: Mapping[str, int],
    parameters: Mapping[str, np.ndarray],
) -> None:
    tensors = {
        rule.name_at(number): rule.to_hf(np.asarray(parameters[rule.path][index]), sizes)
        for rules, numbers in stacks
        for rule in rules
        for index, number in enumerate(numbers)
    }
    write_tensors(directory, stem, tensors)


def _check(reader: TensorReader, stacks: Stacks, sizes: Mapping[str, int], *, tied: bool) -> None:
    """Compares the files' headers with what is expected; raises one ValueError with all of it."""
    found = {
        name: spec.shape
        for name, spec in reader.specs.items()
        if not name.endswith(names.IGNORED_SUFFIXES)
    }
    most = max(len(numbers) for _, numbers in stacks)
    if most > len(found):  # a forged number of layers may be too large to count to
        raise ValueError(
            f"the configuration of {reader.directory} describes {most} layers, and its "
            f"weights are {len(found)} tensors; use the configuration and the weights of one "
            "checkpoint"
        )
    expected = {}
    for rules, numbers in stacks:
        for rule in rules:
            for number in numbers if rule.stacked else (None,):
                expected[rule.name_at(number)] = rule.file_shape(sizes)
    if tied and names.TIED_HEAD in reader.specs:
        expected[names.TIED_HEAD] = (sizes["V"], sizes["D"])
    check_shapes(reader.directory, found, expected)


def check_shapes(directory: pathlib.Path, found: Shapes, expected: Shapes) -> None:
    """Raises one ValueError that lists everything in which the shapes differ, by name."""
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    misshapen = [
        f"{name} {list(found[name])} in place of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    parts = [
        f"{kind} {', '.join(entries)}"
        for kind, entries in (("missing", missing), ("surplus", surplus), ("misshapen", misshapen))
        if entries
    ]
    if parts:
        raise ValueError(
            f"the tensors in {directory} are not those its configuration describes: "
            f"{'; '.join(parts)}; use the configuration and the weights of one checkpoint"
        )


def _common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    kinds = set(dtypes)
    if len(kinds) == 1:
        return kinds.pop()
    halves = {np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)}
    if kinds <= halves:  # neither holds the other
        return np.dtype(np.float32)
    return max(kinds - halves, key=lambda kind: kind.itemsize)
