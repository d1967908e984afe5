"""Safetensors files, single and sharded, against the safetensors library."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from jexit.io.tensor_files import Spec, TensorReader, TensorWriter, write_tensors

RNG = np.random.default_rng(0)
TENSORS = {
    "b.weight": RNG.normal(size=(3, 5)).astype(np.float32),
    "a.weight": RNG.normal(size=(7,)).astype(ml_dtypes.bfloat16),
    "half": RNG.normal(size=(2, 2, 3)).astype(np.float16),
    "double": RNG.normal(size=()).astype(np.float64),
    "empty": np.zeros((0, 4), np.float32),
}
SPECS = {name: Spec(tensor.shape, tensor.dtype) for name, tensor in TENSORS.items()}


def read_all(reader):
    return {name: reader.read(name) for name in reader.specs}


def same(found, wanted):
    return found.keys() == wanted.keys() and all(
        found[k].dtype == wanted[k].dtype and np.array_equal(found[k], wanted[k]) for k in wanted
    )


def test_the_library_reads_what_is_written(tmp_path):
    write_tensors(tmp_path, "model", TENSORS)
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert same({name: file.get_tensor(name) for name in file.keys()}, TENSORS)  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}


def test_what_the_library_writes_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    reader = TensorReader(tmp_path)
    assert reader.specs == SPECS
    assert same(read_all(reader), TENSORS)


def test_tensors_may_come_in_any_order_and_from_views(tmp_path):
    wide = np.asfortranarray(TENSORS["b.weight"])
    with TensorWriter(tmp_path, SPECS) as writer:
        for name in reversed(TENSORS):
            writer.write(name, wide if name == "b.weight" else TENSORS[name])
    assert same(read_all(TensorReader(tmp_path)), TENSORS)


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


def test_a_tensor_that_is_never_written_is_noticed(tmp_path):
    with (
        pytest.raises(AssertionError, match=r"not written: .*half"),
        TensorWriter(tmp_path, SPECS) as writer,
    ):
        for name in TENSORS.keys() - {"half"}:
            writer.write(name, TENSORS[name])


def test_missing_shards_are_named(tmp_path):
    with TensorWriter(tmp_path, SPECS, shard_bytes=70) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00002\.safetensors, which"):
        TensorReader(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_files_is_one_sentence(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        TensorReader(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_one_sentence(tmp_path, kept):
    write_tensors(tmp_path, "model", TENSORS)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        ValueError, match=r"model\.safetensors is damaged or not a safetensors file"
    ):
        TensorReader(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth", "w.pkl", "a.ckpt"])
def test_pickles_are_refused_unread(tmp_path, name):
    (tmp_path / name).write_bytes(b"not even a pickle")
    with pytest.raises(ValueError, match=rf"as a pickle \({name}\), which can run any code"):
        TensorReader(tmp_path)


def test_safetensors_beside_a_pickle_are_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    write_tensors(tmp_path, "model", TENSORS)
    assert same(read_all(TensorReader(tmp_path)), TENSORS)


def test_no_weights_at_all_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors .*copy the"):
        TensorReader(tmp_path)


def test_integer_weights_are_refused(tmp_path):
    save_file({"q": np.zeros((2,), np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"stores q as I8; jexit reads F64, F32, F16, BF16"):
        TensorReader(tmp_path)


@pytest.mark.parametrize("name", ["b.weight", "a.weight", "half", "double"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_tensor_that_is_not_finite_is_neither_read_nor_written(tmp_path, name, value):
    broken = {key: tensor.copy() for key, tensor in TENSORS.items()}
    broken[name].reshape(-1)[-1] = value
    save_file(broken, tmp_path / "model.safetensors")
    reader = TensorReader(tmp_path)
    for other in TENSORS.keys() - {name}:
        reader.read(other)
    words = rf"^{name} in {tmp_path / 'model.safetensors'} holds NaN or infinity; copy it again"
    with pytest.raises(ValueError, match=words):
        reader.read(name)
    with pytest.raises(ValueError, match=rf"^{name} holds NaN or infinity as \w+, so it is not"):
        write_tensors(tmp_path, "other", broken)


def test_a_full_disk_while_writing_raises(tmp_path, full_disk):
    full_disk(100)
    with pytest.raises(OSError, match="No space left"):
        write_tensors(tmp_path, "model", TENSORS)
