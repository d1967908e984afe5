"""Safetensors files, single and sharded, against the safetensors library."""

import itertools
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

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
SPECS = {name: Spec(tensor.shape, tensor.dtype) for name, tensor in TENSORS.items()}


def write_tensors(directory, stem, tensors):
    specs = {name: Spec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    with TensorWriter(directory, specs, stem=stem) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def read_all(reader):
    return {name: reader.read(name) for name in reader.specs}


def same(found, wanted):
    return found.keys() == wanted.keys() and all(
        found[k].dtype == wanted[k].dtype and np.array_equal(found[k], wanted[k]) for k in wanted
    )


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path):
    wide = TENSORS | {"b.weight": np.asfortranarray(TENSORS["b.weight"])}
    write_tensors(tmp_path, "model", dict(reversed(wide.items())))
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="numpy") as file:
        assert same({name: file.get_tensor(name) for name in file.keys()}, TENSORS)  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    save_file(TENSORS, path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")  # beside it, left alone
    reader = TensorReader(tmp_path)
    assert reader.specs == SPECS and same(read_all(reader), TENSORS)
    whole = path.read_bytes()
    for kept in (0, 4, 100, -1):
        path.write_bytes(whole[:kept])
        with pytest.raises(UserError, match="safetensors is damaged or not a safetensors file"):
            TensorReader(tmp_path)


def test_large_checkpoints_are_sharded_with_an_index(tmp_path):
    with TensorWriter(tmp_path, SPECS, shard_bytes=70) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    assert set(index["weight_map"]) == set(TENSORS)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in (1, 2)]
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / shard, framework="numpy") as file:
            assert np.array_equal(file.get_tensor(name), TENSORS[name])
    assert same(read_all(TensorReader(tmp_path)), TENSORS)
    (tmp_path / shards[1]).unlink()
    with pytest.raises(MissingFile, match=rf"lacks {shards[1]}, which"):
        TensorReader(tmp_path)
    for text in ("{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match=r"index\.json has no weight_map"):
            TensorReader(tmp_path)


def test_other_weights_are_refused_unread(tmp_path):
    with pytest.raises(MissingFile, match=r"holds no model\.safetensors .*copy the"):
        TensorReader(tmp_path)
    for name in ("pytorch_model.bin", "model.pt", "x.pth", "w.pkl", "a.ckpt"):
        (tmp_path / name).write_bytes(b"not even a pickle")
        with pytest.raises(UserError, match=rf"as a pickle \({name}\), which can run any code"):
            TensorReader(tmp_path)
        (tmp_path / name).unlink()
    save_file({"q": np.zeros((2,), np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="stores q as I8; jexit reads F64, F32, F16, BF16"):
        TensorReader(tmp_path)


def test_a_tensor_that_is_not_finite_is_neither_read_nor_written(tmp_path):
    for name, value in itertools.product(TENSORS.keys() - {"empty"}, (np.nan, np.inf)):
        broken = {key: tensor.copy() for key, tensor in TENSORS.items()}
        broken[name].reshape(-1)[-1] = value
        save_file(broken, tmp_path / "model.safetensors")
        reader = TensorReader(tmp_path)
        for other in TENSORS.keys() - {name}:
            reader.read(other)
        words = f"^{name} in {tmp_path / 'model.safetensors'} holds NaN or infinity; copy it again"
        with pytest.raises(UserError, match=words):
            reader.read(name)
        with pytest.raises(UserError, match=f"^{name} holds NaN or infinity as \\w+, so it is not"):
            write_tensors(tmp_path, "other", broken)


def test_a_write_that_fails_is_noticed(tmp_path, full_disk):
    with (
        pytest.raises(AssertionError, match=r"not written: .*half"),
        TensorWriter(tmp_path, SPECS) as writer,
    ):
        for name in TENSORS.keys() - {"half"}:
            writer.write(name, TENSORS[name])
    full_disk(100)
    with pytest.raises(OSError, match="No space left"):
        write_tensors(tmp_path, "model", TENSORS)
