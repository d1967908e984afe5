"""Rows of a batch: which a host holds, and their way to the devices and back."""

import dataclasses
import itertools
import os

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jexit.dist import (
    fetch_rows,
    host_rows,
    make_mesh,
    place_rows,
    provide_threads,
    use_mesh,
)
from jexit.dist import mesh as mesh_module
from jexit.errors import UserError


@dataclasses.dataclass(frozen=True)
class Device:
    """What a sharding asks of a device: who owns it."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_a_mesh_takes_the_devices_that_there_are(monkeypatch, caplog):
    assert make_mesh(2, 2, 2).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(UserError, match=r"16 devices .*, but this run has 8; lower these sizes"):
        make_mesh(4, 2, 2)
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # several hosts leave no device idle
    with pytest.raises(UserError, match="the 2 hosts have 8 and must use all of them; choose "):
        make_mesh(2, 2, 1)
    monkeypatch.undo()
    chips = [Device(number, 0, platform="tpu") for number in range(4)]
    monkeypatch.setattr(jax, "make_mesh", lambda sizes, *_, devices, **__: (sizes, len(devices)))
    with caplog.at_level("WARNING", logger="absl"):
        assert make_mesh(1, 2, 1, devices=chips) == ((1, 2, 1), 2)
    assert "2 of this machine's 4 devices, so the others stay idle" in caplog.text


def test_pretended_devices_have_threads(monkeypatch):
    monkeypatch.setenv("PJRT_NPROC", "")
    pretended = "--xla_force_host_platform_device_count=8"
    for flags, threads in ((pretended, "64"), ("--xla_cpu_x=1", None), ("", None)):
        monkeypatch.delenv("PJRT_NPROC", raising=False)
        monkeypatch.setenv("XLA_FLAGS", flags)
        provide_threads()
        assert os.environ.get("PJRT_NPROC") == threads


def hosts_of(mesh_shape, devices_by_host, total, monkeypatch):
    """host_rows as each of several hosts sees it, from devices that only have an owner."""
    devices = [Device(number, host) for number, host in enumerate(devices_by_host)]
    found = []
    for host in sorted(set(devices_by_host)):
        monkeypatch.setattr(jax, "process_count", lambda: len(set(devices_by_host)))
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        grid = np.empty(len(devices), object)
        grid[:] = devices
        mesh = Mesh(grid.reshape(mesh_shape), ("data", "fsdp", "tensor"))
        found.append(mesh_module._host_rows.__wrapped__(mesh, total))
    return found


def test_hosts_hold_the_rows_of_their_devices(monkeypatch):
    for shape, owners, rows, first in (
        # Data over hosts: each its own half.
        ((2, 2, 1), [0, 0, 1, 1], [[0, 1, 2, 3], [4, 5, 6, 7]], [[1] * 4, [1] * 4]),
        # Tensor over hosts: both hold every row, only the first counts them.
        ((2, 1, 2), [0, 1, 0, 1], [list(range(8))] * 2, [[1] * 8, [0] * 8]),
        # A host between two others shares a row shard with each.
        (
            (3, 1, 2),
            [0, 0, 0, 1, 1, 1],
            [list(range(6)), list(range(3, 9))],
            [[1] * 6, [0] * 3 + [1] * 3],
        ),
        # A batch that does not divide lies whole on every host.
        ((2, 2, 1), [0, 0, 1, 1], [list(range(6))] * 2, [[1] * 6, [0] * 6]),
    ):
        total = max(map(max, rows)) + 1
        found = hosts_of(shape, owners, total, monkeypatch)
        assert [host.index_B.tolist() for host in found] == rows
        assert [host.first_B.astype(int).tolist() for host in found] == first
        assert all(host.find(host.index_B[1:3]).tolist() == [1, 2] for host in found)
        counted = np.concatenate([host.index_B[host.first_B] for host in found])
        assert sorted(counted) == list(range(total))  # nothing twice, nothing left out


def test_rows_come_back_as_they_went():
    for sizes, total in itertools.product([(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 1, 8)], (8, 6)):
        batch = {
            "tokens": np.arange(total * 3).reshape(total, 3),
            "weights": np.linspace(0, 1, total, dtype=np.float32),
        }
        with use_mesh(make_mesh(*sizes)):
            rows = host_rows(total)
            placed = place_rows(batch, rows)
            for name, array in fetch_rows(placed).items():
                np.testing.assert_array_equal(array, batch[name])
        assert rows.index_B.tolist() == list(range(total)) and rows.first_B.all()
        shards = {shard.data.shape[0] for shard in placed["tokens"].addressable_shards}
        parts = sizes[0] * sizes[1]
        assert shards == {total // parts if total % parts == 0 else total}
