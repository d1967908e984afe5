"""metrics.jsonl and samples.jsonl grow by whole lines and resume at a step."""

import json
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jexit.io.metrics import MetricsWriter, SamplesWriter, read_metrics, read_samples


def log(workdir, steps, resume_step=None, value=0.0):
    with MetricsWriter(workdir, resume_step, tensorboard=False) as writer:
        for step in steps:
            writer.write(step, {"loss": step + value})


def steps_of(records):
    return [record["step"] for record in records]


def test_each_step_is_one_line_with_step_first(tmp_path):
    with MetricsWriter(tmp_path / "new", tensorboard=False) as writer:
        writer.write(1, {"loss": jnp.float32(0.5), "accuracy": np.float64(0.25), "n": 3})
        writer.write(np.int64(2), {"histogram": jnp.asarray([0.25, 0.75])})
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert lines == [
        '{"step": 1, "loss": 0.5, "accuracy": 0.25, "n": 3.0}',
        '{"step": 2, "histogram": [0.25, 0.75]}',
    ]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, {"loss": 1.0})
    assert steps_of(read_metrics(tmp_path)) == [1]
    writer.close()
    writer.close()
    writer.write(2, {"loss": 1.0})  # closed: nothing happens
    assert steps_of(read_metrics(tmp_path)) == [1]


def test_numbers_that_are_not_finite_come_back_as_nan(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": float("nan"), "parts": [1.0, float("-inf")]})
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["loss"])
    assert record["parts"][0] == 1.0 and math.isnan(record["parts"][1])


def test_resuming_drops_the_steps_after_the_checkpoint(tmp_path):
    log(tmp_path, [1, 2, 3, 4, 5])
    log(tmp_path, [4, 5, 6], resume_step=3, value=100.0)
    records = read_metrics(tmp_path)
    assert steps_of(records) == [1, 2, 3, 4, 5, 6]
    assert [record["loss"] for record in records] == [1, 2, 3, 104, 105, 106]


def test_a_run_without_a_checkpoint_starts_an_empty_log(tmp_path):
    log(tmp_path, [1, 2, 3])
    log(tmp_path, [1])
    assert steps_of(read_metrics(tmp_path)) == [1]


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_torn_last_line_is_skipped_and_then_removed(tmp_path, cut):
    log(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    cut = min(cut, len(last) - 1)
    path.write_bytes(whole[:-cut])
    assert steps_of(read_metrics(tmp_path)) == [1, 2]
    log(tmp_path, [3], resume_step=2)
    assert path.read_bytes() == whole


def test_lines_that_a_disk_fault_spoiled_are_skipped(tmp_path):
    log(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    spoiled = b'\0\0\0\0\n[1, 2]\n{"loss": 3.0}\n{"step": "two"}\n\xff\xfe\n'
    path.write_bytes(spoiled + path.read_bytes())
    assert steps_of(read_metrics(tmp_path)) == [1, 2]
    log(tmp_path, [], resume_step=2)
    assert len(path.read_bytes().splitlines()) == 2


def test_a_full_disk_leaves_whole_lines_and_says_so(tmp_path, full_disk):
    full_disk(70)
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, {"loss": 1.0})
    with pytest.raises(ValueError, match=r"cannot write .*metrics\.jsonl: No space.*free some"):
        for step in range(2, 10):
            writer.write(step, {"loss": float(step)})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("}\n")
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2]


def test_a_metric_that_is_no_number_is_refused_by_name(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        with pytest.raises(ValueError, match="metric 'verdict' is 'right'; metrics are numbers"):
            writer.write(1, {"verdict": "right"})
        with pytest.raises(ValueError, match="metric 'matrix' is"):
            writer.write(1, {"matrix": np.zeros((2, 2))})
    assert read_metrics(tmp_path) == []


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path):
    with MetricsWriter(tmp_path / "run", enabled=False) as writer:
        writer.write(1, {"loss": 1.0})
    with SamplesWriter(tmp_path / "run", enabled=False) as writer:
        writer.write(1, {"prompt": "x"})
    assert not (tmp_path / "run").exists()


def test_wandb_without_its_package_is_one_sentence_before_anything_is_written(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="the wandb package is not installed; pip install"):
        MetricsWriter(tmp_path / "run", wandb="project")
    assert not (tmp_path / "run").exists()


def test_wandb_gets_flat_values_under_their_step(tmp_path, monkeypatch):
    class Recorder:
        def __init__(self):
            self.calls = []

        def init(self, **arguments):
            self.calls.append(("init", arguments))
            return self

        def log(self, values, step):
            self.calls.append((step, values))

        def finish(self):
            self.calls.append("finish")

    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    with MetricsWriter(tmp_path, tensorboard=False, wandb="early-exits") as writer:
        writer.write(3, {"loss": 0.5, "share": [0.25, 0.75]})
    assert recorder.calls[0][1]["project"] == "early-exits"
    assert recorder.calls[1:] == [
        (3, {"loss": 0.5, "share/0": 0.25, "share/1": 0.75}),
        "finish",
    ]


def test_samples_keep_their_records_and_resume_like_metrics(tmp_path):
    record = {"prompt": "2+2 \n ist – 四", "depths": np.asarray([8, 2]), "reward": np.float32(1)}
    with SamplesWriter(tmp_path) as writer:
        writer.write(1, record)
        writer.write(5, [record, record])
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "prompt": "2+')
    expected = {"prompt": record["prompt"], "depths": [8, 2], "reward": 1.0}
    assert read_samples(tmp_path) == [{"step": step, **expected} for step in (1, 5, 5)]
    with SamplesWriter(tmp_path, resume_step=3) as writer:
        writer.write(4, {"prompt": "later"})
    assert steps_of(read_samples(tmp_path)) == [1, 4]


def test_there_may_be_no_log_yet(tmp_path):
    assert read_metrics(tmp_path) == [] and read_samples(tmp_path / "none") == []
