"""Checkpoints hold a whole run state, bit for bit, or are passed over."""

import dataclasses
import logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jexit.config import CheckpointConfig
from jexit.dist import make_mesh, place_parameters, use_mesh
from jexit.errors import UserError
from jexit.io.checkpoint import Checkpoints
from jexit.steps.state import new_state

# Orbax leaves futures behind when the files under it are damaged.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)


def make_tree(step=0, width=8):
    """A training state and what a loop keeps on the host."""
    rng = np.random.default_rng(step)
    trainable = {
        "blocks": {"lora_a": jnp.asarray(rng.normal(size=(4, width)), jnp.float32)},
        "exits": {"b2": jnp.asarray(rng.normal(size=5), jnp.bfloat16)},
    }
    state = new_state(trainable, optax.adam(1e-3))
    state = dataclasses.replace(state, step=jnp.int32(step))
    # Float64, which jax would round: a resumed run must not differ in the last bit. Noise, so that
    # most bytes of the files are its values.
    host = {"pressure": np.asarray([np.nan, step + 1 / 3]), "noise": rng.normal(size=9_000)}
    return {"state": state, "host": host}


def open_checkpoints(workdir, **config):
    return Checkpoints(workdir, CheckpointConfig(**{"every": 10, "keep": 2} | config))


def restore(workdir, like=None):
    checkpoints = open_checkpoints(workdir)
    try:
        return checkpoints.restore(make_tree() if like is None else like)
    finally:
        checkpoints.close()


def same(found, wanted):
    leaves = list(zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
    return jax.tree.structure(found) == jax.tree.structure(wanted) and all(
        x.dtype == y.dtype and np.array_equal(x, y, equal_nan=x.dtype.kind == "f")
        for x, y in leaves
    )


def stored(workdir):
    """The finished steps: threads of a save that fails may still write to its temporary folder."""
    return sorted(path.name for path in (workdir / "checkpoints").iterdir() if path.suffix == "")


def spoil(workdir, step, change):
    """Changes the file that holds most of a checkpoint's bytes."""
    files = (workdir / "checkpoints" / str(step) / "default").rglob("d/*")
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(change(bytearray(largest.read_bytes())))


def flipped(data):
    data[len(data) // 2] ^= 0x01
    return data


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's directory with the checkpoints of steps 20 and 30 (10 is gone: two are kept)."""
    workdir = tmp_path_factory.mktemp("run")
    checkpoints = open_checkpoints(workdir)
    for step in (10, 20, 30):
        checkpoints.save(step, make_tree(step))
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def test_a_state_comes_back_bit_for_bit(workdir, tmp_path):
    assert stored(workdir) == ["20", "30"]  # only the newest few are kept
    left = workdir / "checkpoints" / "40.orbax-checkpoint-tmp"  # by a killed save: is cleared
    left.mkdir()
    found = restore(workdir)
    assert same(found, make_tree(30)) and not same(found, make_tree(20))
    assert isinstance(found["host"]["pressure"], np.ndarray)
    checkpoints = open_checkpoints(workdir)
    assert checkpoints.latest_step() == 30
    checkpoints.save(30, make_tree(31))  # a step that is saved already is left alone
    checkpoints.close()
    (workdir / "checkpoints" / "30" / "_CHECKPOINT_METADATA").unlink()  # the digests
    assert same(restore(workdir), make_tree(30))
    assert stored(workdir) == ["20", "30"]
    assert not left.exists()
    checkpoints = open_checkpoints(tmp_path / "new")
    assert checkpoints.latest_step() is None and checkpoints.restore(make_tree()) is None
    assert [s for s in range(1, 31) if checkpoints.due(s)] == [10, 20, 30]
    checkpoints.close()
    assert not open_checkpoints(tmp_path / "none", every=0).due(10)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(saved, tmp_path, caplog):
    for how, change in {
        "altered": flipped,  # one bit, which the storage itself does not notice
        "truncated": lambda data: data[: len(data) // 2],
        "empty": lambda data: b"",
        "no metadata": lambda data: data,
    }.items():
        workdir = pathlib.Path(shutil.copytree(saved, tmp_path / how))
        spoil(workdir, 30, change)
        if how == "no metadata":
            (workdir / "checkpoints" / "30" / "default" / "_METADATA").write_text("{")
        with caplog.at_level(logging.WARNING):
            assert same(restore(workdir), make_tree(20)), how
        assert f"Checkpoint {workdir / 'checkpoints' / '30'} cannot be read" in caplog.text
        assert "Resuming from the earlier checkpoint of step 20" in caplog.text
        # Gone: or the resumed run could not save its own step 30.
        assert stored(workdir) == ["20"]
    spoil(workdir, 20, flipped)
    with pytest.raises(UserError, match=r"none of the checkpoints \[20\] in .*; remove the"):
        restore(workdir)
    assert stored(workdir) == ["20"]


def test_a_checkpoint_of_other_parameters_is_one_sentence(workdir):
    surplus, missing = make_tree(), make_tree()
    surplus["host"]["extra"] = np.zeros(2)
    del missing["host"]["pressure"]
    place = "in the checkpoint .*checkpoints/30,"
    for like, words in (
        (make_tree(width=6), rf"lora_a has shape \(4, 8\) {place} but it has shape \(4, 6\) in"),
        (surplus, rf"host/extra is missing {place} but it has shape \(2,\) in"),
        (missing, rf"host/pressure has shape \(2,\) {place} but it is missing in"),
    ):
        with pytest.raises(UserError, match=f"{words} this config; use the config of the c"):
            restore(workdir, like)
    assert stored(workdir) == ["20", "30"]


def test_what_cannot_be_saved_is_one_sentence_and_evicts_nothing(workdir, tmp_path, full_disk):
    checkpoints = open_checkpoints(workdir)
    for part in ("trainable", "opt_state"):
        tree = make_tree(40)
        broken = jax.tree.map(lambda leaf: leaf * jnp.nan, getattr(tree["state"], part))
        tree["state"] = dataclasses.replace(tree["state"], **{part: broken})
        words = r"state/\w+/.* contains NaN or infinity after step 40, so no checkpoint of"
        with pytest.raises(UserError, match=words):
            checkpoints.save(40, tree)
    words = r"a checkpoint cannot be written to \S+ \(File too large\); free some"
    with full_disk(30_000), pytest.raises(UserError, match=words):
        checkpoints.save(40, make_tree(40))
        checkpoints.wait()
    assert same(restore(workdir), make_tree(30))
    assert stored(workdir) == ["20", "30"]
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*checkpoints.*choose another place"):
        open_checkpoints(tmp_path / "file")


def test_the_best_are_kept_besides_the_newest(tmp_path):
    checkpoints = open_checkpoints(tmp_path, keep=1, keep_best=2)
    assert checkpoints.best_step() is None
    for step, score in {10: 0.5, 20: 0.9, 30: float("-inf"), 40: 0.9, 50: 0.1}.items():
        checkpoints.save(step, make_tree(step), score)
    checkpoints.close()
    assert stored(tmp_path) == ["20", "40", "50"]
    # What a later process finds: the newest to go on from, the best to end with.
    checkpoints = open_checkpoints(tmp_path, keep=1, keep_best=2)
    assert same(checkpoints.restore(make_tree()), make_tree(50))
    assert checkpoints.best_step() == 40  # the later of equals
    assert same(checkpoints.restore(make_tree(), 40), make_tree(40))
    assert [checkpoints.newest(step) for step in (19, 39, 60)] == [None, 20, 50]
    spoil(tmp_path, 40, flipped)  # a damaged best is not replaced by another
    with pytest.raises(UserError, match=r"none of the checkpoints \[40\] in .* can be read"):
        checkpoints.restore(make_tree(), checkpoints.best_step())
    checkpoints.close()


def test_a_checkpoint_of_eight_devices_is_restored_on_one_and_on_two(tmp_path):
    wanted = make_tree(7)
    for number, mesh in enumerate((make_mesh(2, 2, 2), make_mesh(1, 1, 1), make_mesh(1, 2, 1))):
        workdir, placed = tmp_path / str(number), {}
        with use_mesh(mesh):
            for step in (0, 7):
                tree = make_tree(step)
                placed[step] = tree | {"state": place_parameters(tree["state"])}
            found = placed[7]
            if number:
                found = restore(shutil.copytree(tmp_path / str(number - 1), workdir), placed[0])
                shutil.rmtree(workdir)
            assert same(jax.device_get(found), jax.device_get(wanted))
            trees = (found["state"], placed[0]["state"])
            ours, theirs = ([leaf.sharding for leaf in jax.tree.leaves(tree)] for tree in trees)
            assert ours == theirs
            checkpoints = open_checkpoints(workdir)
            checkpoints.save(7, found)
            checkpoints.close()
    lora_a = found["state"].trainable["blocks"]["lora_a"]
    assert lora_a.sharding.device_set == set(jax.devices()[:2])
