"""Reads and writes safetensors files one tensor at a time.

Reading uses the safetensors library without memory maps, so that memory contains only the tensors
that are being converted. Writing does not use the library, because a file is laid out before the
data of its tensors exist. A file consists of an 8-byte little-endian header length, a JSON header
of dtypes, shapes and offsets, and the bytes of the tensors
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jexit.errors import MissingFile, UserError
from jexit.io.files import write_json
from jexit.io.finite import all_finite
from jexit.untrusted import parse_json, read_object

SHARD_BYTES = 5_000_000_000
_CODES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_DTYPES = {code: np.dtype(kind) for code, kind in _CODES.items()}
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPES.items()}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclasses.dataclass(frozen=True)
class Spec:
    """The shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorReader:
    """Reads the tensors in `STEM.safetensors`, or in the shards listed in its index file.

    STEM is the argument `stem`. The constructor reads only the headers: `specs` then contains the
    shape and dtype of every tensor by name. Raises MissingFile if neither file exists, or if shards
    are missing. Raises UserError if the weights are stored as a pickle, if a file is damaged, if a
    dtype is not supported, or if two files contain the same tensor.
    """

    def __init__(self, directory: pathlib.Path, stem: str = "model"):
        self.directory = pathlib.Path(directory)
        self._files = {}
        self.specs: dict[str, Spec] = {}
        for path in _find_files(self.directory, stem):
            self._open(path)

    def _open(self, path: pathlib.Path) -> None:
        try:
            file = safe_open(path, framework="numpy", backend="pread")
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            parse_json(_header(path))  # rejects duplicate keys, of which the library uses the last
        except PermissionError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror or error}); make it readable"
            ) from error
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{path} is damaged or not a safetensors file ({error}); copy it again"
            ) from error
        for name, part in slices.items():
            if name in self.specs:
                raise UserError(
                    f"{path} and {self._files[name][0].name} both contain {name}; copy the "
                    "checkpoint again"
                )
            code = part.get_dtype()
            if code not in _DTYPES:
                raise UserError(
                    f"{path} stores {name} as {code}, but jexit reads only {', '.join(_DTYPES)}; "
                    "convert the checkpoint to one of these dtypes"
                )
            self.specs[name] = Spec(tuple(part.get_shape()), _DTYPES[code])
            self._files[name] = (path, file)

    def read(self, name: str) -> np.ndarray:
        """Returns the stored tensor `name`; raises UserError if it is damaged or not finite."""
        path, file = self._files[name]
        try:
            tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{name} cannot be read from {path} ({error}); copy the file again"
            ) from error
        if not all_finite(tensor):
            raise UserError(
                f"{name} in {path} contains NaN or infinity; copy the file again, or use a "
                "checkpoint whose training did not diverge"
            )
        return tensor


def _header(path: pathlib.Path) -> bytes:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _find_files(directory: pathlib.Path, stem: str) -> list[pathlib.Path]:
    single = directory / f"{stem}.safetensors"
    if single.exists():
        return [single]
    index = directory / f"{stem}.safetensors.index.json"
    if index.exists():
        names = read_object(index, "copy it again").get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
            raise UserError(
                f"{index} has no valid weight_map, which must map the names of tensors to the "
                "names of files; copy the index again"
            )
        if other := [n for n in names.values() if "/" in n or not n.endswith(".safetensors")]:
            raise UserError(
                f"{index} names {other[0][:80]!r}, which is not a .safetensors file beside it; "
                "copy the checkpoint again, with all its files in one directory"
            )
        shards = [directory / name for name in sorted(set(names.values()))]
        gone = [shard.name for shard in shards if not shard.exists()]
        if gone:
            raise MissingFile(
                f"{directory} does not contain {', '.join(gone)}, which {index.name} lists; copy "
                "the missing shards"
            )
        return shards
    pickles = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
    if pickles:
        raise UserError(
            f"{directory} stores its weights as a pickle ({pickles[0]}), which can run any code, "
            "so jexit does not read it; convert the checkpoint to safetensors first"
        )
    raise MissingFile(
        f"{directory} contains no {stem}.safetensors (nor {index.name} with shards); copy the "
        "checkpoint's weights into it"
    )


class TensorWriter:
    """Writes `STEM.safetensors`, or shards with an index file if the tensors exceed `shard_bytes`.

    The constructor lays out the files for `specs`; `write` accepts the tensors in any order. At the
    end of the `with` block, every tensor must have been written.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        specs: Mapping[str, Spec],
        *,
        stem: str = "model",
        shard_bytes: int = SHARD_BYTES,
    ):
        self._specs = dict(specs)
        self._offsets: dict[str, tuple[Any, int]] = {}
        self._files = []
        shards = _plan_shards(specs, shard_bytes)
        weight_map = {}
        for number, names in enumerate(shards, 1):
            suffix = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
            path = pathlib.Path(directory) / f"{stem}{suffix}.safetensors"
            self._lay_out(path, names)
            weight_map.update(dict.fromkeys(names, path.name))
        if len(shards) > 1:
            total = sum(spec.bytes for spec in specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(pathlib.Path(directory) / f"{stem}.safetensors.index.json", index)

    def _lay_out(self, path: pathlib.Path, names: list[str]) -> None:
        # Wide dtypes first, so that every tensor is aligned to its own item size.
        names = sorted(names, key=lambda name: -self._specs[name].dtype.itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            spec = self._specs[name]
            header[name] = {
                "dtype": _CODE_OF_DTYPE[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.bytes],
            }
            offset += spec.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("wb")
        self._files.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
        for name in names:
            self._offsets[name] = (file, 8 + len(text) + header[name]["data_offsets"][0])

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Writes the tensor `name`; raises UserError if it contains NaN or infinity."""
        spec = self._specs[name]
        assert tensor.shape == spec.shape and tensor.dtype == spec.dtype, (name, tensor.shape, spec)
        if not all_finite(tensor):
            raise UserError(
                f"{name} contains NaN or infinity as {spec.dtype}, so it is not written; use a "
                "wider dtype, or a model whose parameters are all finite"
            )
        file, offset = self._offsets.pop(name)
        file.seek(offset)
        file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close()
        assert kind is not None or not self._offsets, f"not written: {sorted(self._offsets)}"


def _plan_shards(specs: Mapping[str, Spec], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.bytes > shard_bytes:
            shards, filled = [*shards, []], 0
        shards[-1].append(name)
        filled += spec.bytes
    return shards
