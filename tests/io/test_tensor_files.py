"""Safetensors files, single and sharded, against the safetensors library."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jexit.errors import MissingFile, UserError
from jexit.io.tensor_files import Spec, TensorReader, TensorWriter

RNG = np.random.default_rng(0)
TENSORS = {
    "b.weight": RNG.normal(size=(3, 5)).astype(np.float32),
    "a.weight": RNG.normal(size=(7,)).astype(ml_dtypes.bfloat16),
    "half": RNG.normal(size=(2, 2, 3)).astype(np.float16),
    "double": RNG.normal(size=()).astype(np.float64),
    "empty": np.zeros((0, 4), np.float32),
}


def write_tensors(directory, tensors, **options):
    specs = {name: Spec(tensor.shape, tensor.dtype) for name, tensor in TENSORS.items()}
    with TensorWriter(directory, specs, **options) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def same(found, wanted):
    return found.keys() == wanted.keys() and all(
        found[k].dtype == wanted[k].dtype and np.array_equal(found[k], wanted[k]) for k in wanted
    )


def read_all(directory):
    reader = TensorReader(directory)
    tensors = {name: reader.read(name) for name in reader.specs}
    assert {name: Spec(t.shape, t.dtype) for name, t in tensors.items()} == reader.specs
    return tensors


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path):
    wide = TENSORS | {"b.weight": np.asfortranarray(TENSORS["b.weight"])}
    write_tensors(tmp_path, dict(reversed(wide.items())))
    path = tmp_path / "model.safetensors"
    assert same(load_file(path), TENSORS)
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    save_file(TENSORS, path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")  # beside it, left alone
    assert same(read_all(tmp_path), TENSORS)
    whole = path.read_bytes()
    for kept in (0, 4, 100, -1):
        path.write_bytes(whole[:kept])
        with pytest.raises(UserError, match="safetensors is damaged or not a safetensors file"):
            TensorReader(tmp_path)


def test_large_checkpoints_are_sharded_with_an_index(tmp_path):
    write_tensors(tmp_path, TENSORS, shard_bytes=70)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    shards = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == shards
    loaded = {shard: load_file(tmp_path / shard) for shard in shards}
    assert same({k: loaded[shard][k] for k, shard in index["weight_map"].items()}, TENSORS)
    assert same(read_all(tmp_path), TENSORS)
    for text in ("{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match=r"index\.json has no valid weight_map"):
            TensorReader(tmp_path)


def test_other_weights_are_refused_unread(tmp_path):
    with pytest.raises(MissingFile, match=r"contains no model\.safetensors .*copy the"):
        TensorReader(tmp_path)
    for name in ("pytorch_model.bin", "model.pt", "x.pth", "w.pkl", "a.ckpt"):
        (tmp_path / name).write_bytes(b"not even a pickle")
        with pytest.raises(UserError, match=rf"as a pickle \({name}\), which can run any code"):
            TensorReader(tmp_path)
        (tmp_path / name).unlink()
    save_file({"q": np.zeros((2,), np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="stores q as I8, but jexit reads only F64, F32, F16"):
        TensorReader(tmp_path)


def test_what_cannot_be_written_is_noticed(tmp_path, full_disk):
    for name in TENSORS.keys() - {"empty"}:
        broken = {key: tensor.copy() for key, tensor in TENSORS.items()}
        broken[name].reshape(-1)[-1] = np.inf
        with pytest.raises(UserError, match=f"^{name} contains NaN or infinity as \\w+, so it is"):
            write_tensors(tmp_path, broken)
    with pytest.raises(AssertionError, match=r"not written: .*half"):
        write_tensors(tmp_path, {key: TENSORS[key] for key in TENSORS.keys() - {"half"}})
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        write_tensors(tmp_path, TENSORS)
