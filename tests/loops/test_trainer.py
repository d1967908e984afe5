"""The signals that stop a run, and the steps that it skips."""

import math
import signal

import jax.numpy as jnp
import pytest

from jexit.config import CheckpointConfig, Config, LogConfig, OptimConfig
from jexit.loops import trainer
from jexit.loops.trainer import Diverged, Interrupted, Trainer, _StopSignals
from jexit.steps.state import TrainState


@pytest.fixture
def clock(monkeypatch):
    """The trainer's clock, which stands still until told otherwise."""
    now = [100.0]
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    return now


def test_an_echo_of_the_first_signal_is_the_same_request(clock):
    """A launcher signals a process and then its whole group."""
    before = signal.getsignal(signal.SIGTERM)
    for first in (signal.SIGTERM, signal.SIGINT):
        with (stop := _StopSignals()):
            signal.raise_signal(first)
            signal.raise_signal(signal.SIGTERM)
            clock[0] += 0.9
            signal.raise_signal(signal.SIGTERM)
            assert stop.name == first.name
            clock[0] += 0.2
            with pytest.raises(KeyboardInterrupt):  # a later one stops at once
                signal.raise_signal(signal.SIGTERM)
    with _StopSignals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):  # somebody at the keyboard who insists means it
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before


STATE = TrainState(jnp.int32(0), {"w": jnp.ones(3)}, {"mu": jnp.zeros(3)}, jnp.int32(0))


def train(workdir, losses, *, every=1, signal_after=None, **optim):
    """A run whose steps have these losses; one that is NaN is skipped, as the real steps do it."""
    config = Config(
        command="sft",
        steps=len(losses),
        optim=OptimConfig(**optim),
        checkpoint=CheckpointConfig(every=every, keep=2, keep_best=1, final="best"),
        log=LogConfig(tensorboard=False),
    )
    run = Trainer(config, workdir, "test", shown={})
    state = run.restore(STATE)

    def one_step(state, step):
        good = math.isfinite(losses[step])
        weights = state.trainable["w"] + good
        skipped = jnp.int32(0) if good else state.skipped + 1
        if step + 1 == signal_after:
            signal.raise_signal(signal.SIGTERM)
        state = TrainState(state.step + 1, {"w": weights}, state.opt_state, skipped)
        return state, {"loss": losses[step], "skipped": skipped}

    try:
        return run.chosen(run.run(state, one_step))
    finally:
        run.close()


def stored(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


NAN = math.nan


def test_no_checkpoint_is_written_while_steps_are_skipped(tmp_path):
    """So the last good one is named, and it is still there."""
    with pytest.raises(Diverged, match=r"in 3 consecutive steps up to step 5") as caught:
        train(tmp_path, [1.0, 1.0, NAN, NAN, NAN, 1.0], max_skipped=3)
    assert f"checkpoint: step 2 in {tmp_path / 'checkpoints'}); lower" in str(caught.value)
    assert stored(tmp_path) == [1, 2]


def test_checkpoints_go_on_when_steps_do(tmp_path, capsys):
    state = train(tmp_path, [1.0, NAN, 1.0, NAN, 0.5], max_skipped=2)
    assert stored(tmp_path) == [3, 5]
    assert float(state.trainable["w"][0]) == 4.0
    assert "Skipped 2 of 5 steps, because their loss, gradients" in capsys.readouterr().out


def test_a_run_whose_every_step_is_skipped_is_no_success(tmp_path):
    with pytest.raises(Diverged, match=r"in all 3 steps \(last good checkpoint: none was written"):
        train(tmp_path, [NAN, NAN, NAN], max_skipped=5)
    assert stored(tmp_path) == []


def test_the_best_of_a_run_without_a_checkpoint_is_its_end(tmp_path, capsys):
    state = train(tmp_path / "skips", [1.0, 1.0, NAN], every=0)
    assert stored(tmp_path / "skips") == []
    assert float(state.trainable["w"][0]) == 3.0
    capsys.readouterr()
    train(tmp_path / "whole", [1.0, 1.0])
    assert "kipped" not in capsys.readouterr().out


def test_a_run_that_is_stopped_while_it_skips_goes_on_from_the_last_good_step(tmp_path, capsys):
    words = (
        r"after step 3; steps are being skipped \(last good checkpoint: step 1 in .*\), and the sam"
    )
    with pytest.raises(Interrupted, match=words):
        train(tmp_path, [1.0, NAN, NAN, 1.0], signal_after=3)
    assert stored(tmp_path) == [1]
    capsys.readouterr()
    state = train(tmp_path, [1.0, NAN, NAN, 1.0])
    assert float(state.trainable["w"][0]) == 3.0
    assert "Skipped 2 of 4 steps" in capsys.readouterr().out
