"""metrics.jsonl and samples.jsonl grow by whole lines and resume at a step; TensorBoard follows."""

import math
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jexit.errors import UserError
from jexit.io.metrics import MetricsWriter, SamplesWriter, read_metrics, read_samples
from jexit.io.tensorboard import EventFile


def log(workdir, steps, resume_step=0, value=0.0):
    with MetricsWriter(workdir, resume_step, tensorboard=False) as writer:
        for step in steps:
            writer.write(step, {"loss": step + value})


def steps_of(records):
    return [record["step"] for record in records]


def test_each_step_is_one_line_at_once(tmp_path):
    workdir = tmp_path / "new"
    with MetricsWriter(workdir, enabled=False) as first, SamplesWriter(workdir, enabled=False) as s:
        first.write(1, {"loss": 1.0})  # of a process that is not the first
        s.write(1, [{"prompt": "x"}])
    assert not workdir.exists() and read_metrics(workdir) == [] and read_samples(workdir) == []
    with MetricsWriter(workdir, tensorboard=False) as writer:
        writer.write(1, {"loss": jnp.float32(0.5), "accuracy": np.float64(0.25), "n": 3})
        assert steps_of(read_metrics(workdir)) == [1]
        writer.write(np.int64(2), {"histogram": jnp.asarray([0.25, np.inf])})
        for value in ("right", np.zeros((2, 2))):
            with pytest.raises(ValueError, match=r"metric 'verdict' is .*, but it must be a num"):
                writer.write(3, {"verdict": value})
    assert (workdir / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 1, "loss": 0.5, "accuracy": 0.25, "n": 3.0}',
        '{"step": 2, "histogram": [0.25, null]}',
    ]
    assert math.isnan(read_metrics(workdir)[1]["histogram"][1])
    assert not (workdir / "tensorboard").exists()


def test_resuming_drops_the_steps_after_the_checkpoint(tmp_path):
    log(tmp_path, [1, 2, 3, 4, 5])
    log(tmp_path, [4, 5, 6], resume_step=3, value=100.0)
    assert [record["loss"] for record in read_metrics(tmp_path)] == [1, 2, 3, 104, 105, 106]
    log(tmp_path, [1])  # a run without a checkpoint starts from nothing
    assert steps_of(read_metrics(tmp_path)) == [1]
    record = {"prompt": "2+2 \n ist – 四", "depths": np.asarray([8, 2]), "reward": np.float32(1)}
    with SamplesWriter(tmp_path) as writer:
        writer.write(1, [record])
        writer.write(5, [record, record])
    expected = {"prompt": record["prompt"], "depths": [8, 2], "reward": 1.0}
    assert read_samples(tmp_path) == [{"step": step, **expected} for step in (1, 5, 5)]
    with SamplesWriter(tmp_path, resume_step=3):
        assert steps_of(read_samples(tmp_path)) == [1]


def test_torn_and_spoiled_lines_are_skipped_and_then_removed(tmp_path):
    log(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[-1])):
        path.write_bytes(whole[:-cut])
        assert steps_of(read_metrics(tmp_path)) == [1, 2]
    log(tmp_path, [3], resume_step=2)
    assert path.read_bytes() == whole
    path.write_bytes(b'\0\0\0\0\n[1, 2]\n{"loss": 3.0}\n{"step": "two"}\n\xff\xfe\n' + whole)
    assert steps_of(read_metrics(tmp_path)) == [1, 2, 3]
    log(tmp_path, [], resume_step=3)
    assert path.read_bytes() == whole


def test_a_full_disk_leaves_whole_lines_and_says_so(tmp_path, full_disk, monkeypatch):
    words = r"cannot write .*metrics\.jsonl: File too large; free some"
    with full_disk(70), pytest.raises(UserError, match=words):
        log(tmp_path, range(1, 10))
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
    assert steps_of(read_metrics(tmp_path)) == [1, 2]

    def no_space(*_):
        raise OSError(28, "No space left on device")

    with MetricsWriter(tmp_path) as writer:
        monkeypatch.setattr(EventFile, "_write", no_space)
        with pytest.raises(UserError, match=r"cannot write .*tensorboard: No space left"):
            writer.write(1, {"loss": 1.0})


def events_in(directory):
    """The events of every file, in order, from their TFRecord framing."""
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_metrics_reach_tensorboard_at_their_steps(tmp_path):
    def scalars():
        events = events_in(tmp_path / "tensorboard")
        return [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]

    expected = [(1, "loss", 0.5), (1, "share/0", 0.25), (1, "share/1", 0.75)]
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.5, "share": [0.25, 0.75]})
        assert scalars() == expected  # flushed line by line: a killed run loses nothing
    with MetricsWriter(tmp_path, resume_step=3):
        pass
    # A reader drops what it holds of steps from a START event's on.
    sessions = [e for e in events_in(tmp_path / "tensorboard") if e.HasField("session_log")]
    assert [e.step for e in sessions if e.session_log.status == SessionLog.START] == [1, 4]


def test_wandb_gets_flat_values_under_their_step(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed"):
        MetricsWriter(tmp_path / "run", wandb="project")
    assert not (tmp_path / "run").exists()

    class Recorder(list):
        def init(self, **arguments):
            self.append(arguments["project"])
            ids.append(arguments["id"])
            return self

        def log(self, values, step):
            self.append((step, values))

        def finish(self):
            self.append("finish")

    recorder, ids = Recorder(), []
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    with MetricsWriter(tmp_path, tensorboard=False, wandb="early-exits") as writer:
        writer.write(3, {"loss": 0.5, "share": [0.25, 0.75]})
    flat = {"loss": 0.5, "share/0": 0.25, "share/1": 0.75}
    assert recorder == ["early-exits", (3, flat), "finish"]
    for workdir in (tmp_path, tmp_path / "other"):  # resumes W&B's run, and begins another
        MetricsWriter(workdir, tensorboard=False, wandb="early-exits").close()
    assert ids[0] == ids[1] != ids[2]
