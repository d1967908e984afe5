"""Arrays on disk come back bit for bit or are named as damaged."""

import resource

import ml_dtypes
import numpy as np
import pytest

from jexit.io.array_store import ArrayStore
from jexit.io.tensor_files import Spec

# Orbax leaves futures behind when the files under it are damaged.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_arrays_come_back_bit_for_bit(tmp_path, dtype):
    store = ArrayStore(tmp_path / "base")
    array = np.random.default_rng(0).normal(size=(3, 1, 5)).astype(dtype)
    store.write("blocks.attn.q.kernel", array)
    found = store.read("blocks.attn.q.kernel")
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()
    assert store.spec("blocks.attn.q.kernel") == Spec((3, 1, 5), array.dtype)


def test_names_are_listed_in_order(tmp_path):
    store = ArrayStore(tmp_path / "exits")
    assert store.names() == [] and list(store.items()) == []
    for name in ("exits.w2", "exits.b2"):
        store.write(name, np.zeros(2, np.float32))
    assert store.names() == ["exits.b2", "exits.w2"]
    assert [name for name, _ in store.items()] == store.names()


@pytest.mark.parametrize("how", ["truncated", "no_data", "no_metadata", "empty"])
def test_damage_is_one_sentence_that_names_the_parameter(tmp_path, how):
    store = ArrayStore(tmp_path / "base")
    store.write("norm.scale", np.random.default_rng(0).normal(size=500).astype(np.float32))
    directory = tmp_path / "base" / "norm.scale"
    for path in directory.rglob("*"):
        if not path.is_file() or (how == "no_metadata") != (path.name == "_METADATA"):
            continue
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if how == "truncated" else b"")
        if how.startswith("no_"):
            path.unlink()
    with pytest.raises(ValueError, match=r"the parameter norm\.scale in .*base cannot be read"):
        store.read("norm.scale")


def test_a_parameter_that_is_not_there_is_one_sentence(tmp_path):
    for ask in (ArrayStore(tmp_path).read, ArrayStore(tmp_path).spec):
        with pytest.raises(ValueError, match=r"the parameter gone in .* cannot be read"):
            ask("gone")


def test_a_full_disk_is_one_sentence(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may pass this size: writes fail inside the storage library, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        words = r"the parameter w cannot be written to \S+ \(File too large\); free some"
        with pytest.raises(ValueError, match=words):
            ArrayStore(tmp_path).write("w", np.random.default_rng(0).normal(size=10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
