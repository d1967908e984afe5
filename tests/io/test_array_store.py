"""Arrays on disk come back bit for bit; damage is tested with the models that hold them."""

import ml_dtypes
import numpy as np
import pytest

from jexit.errors import UserError
from jexit.io.array_store import ArrayStore
from jexit.io.tensor_files import Spec


def test_arrays_come_back_bit_for_bit(tmp_path):
    store = ArrayStore(tmp_path / "base")
    assert store.names() == []
    for number, dtype in enumerate((np.float32, ml_dtypes.bfloat16, np.float16)):
        array = np.random.default_rng(0).normal(size=(3, 1, 5)).astype(dtype)
        store.write(f"blocks.{2 - number}", array)
        found = store.read(f"blocks.{2 - number}")
        assert found.dtype == array.dtype and found.tobytes() == array.tobytes()
        assert store.spec(f"blocks.{2 - number}") == Spec((3, 1, 5), array.dtype)
    assert store.names() == ["blocks.0", "blocks.1", "blocks.2"]
    for ask in (store.read, store.spec):
        with pytest.raises(UserError, match=r"the parameter gone in .* cannot be read"):
            ask("gone")
