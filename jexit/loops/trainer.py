"""Code shared by all training loops: resuming, logging, checkpoints and clean stops."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import resource
import signal
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jexit.config import Config
from jexit.dist import gather, is_primary, place_parameters, waiting
from jexit.errors import INTERRUPTED, RunEnded, SharedUserError, UserError
from jexit.io.checkpoint import Checkpoints
from jexit.io.metrics import MetricsWriter, SamplesWriter, read_metrics
from jexit.io.progress import Progress
from jexit.loops.compilations import Compilations
from jexit.loops.flops import mfu
from jexit.steps.state import TrainState

Pending = tuple[int, dict[str, Any]]  # a step, and its metrics, not yet fetched from the device
# (state, step) → (state after the step, metrics on device or host)
OneStep = Callable[[TrainState, int], tuple[TrainState, dict[str, Any]]]


class Kept(Protocol):
    """A part of a training loop with state on the host, which checkpoints save by unique names."""

    def state(self) -> dict[str, np.ndarray]: ...

    def load(self, values: dict[str, np.ndarray]) -> None: ...


class Diverged(RunEnded):
    """Raised after too many non-finite steps; the message names the last good checkpoint."""


class Collapsed(RunEnded):
    """Raised when RL collapses; the message names the failure and the model that was kept."""


class Interrupted(RunEnded):
    """Raised after a signal has stopped the run between steps; the same command resumes the run."""

    exit_code = INTERRUPTED


@dataclasses.dataclass
class Trainer:
    """Runs the steps of a training loop, from the newest checkpoint to step `steps`.

    Step n is dispatched before the metrics of step n − 1 are fetched, so the device never waits for
    the log. The metrics `tokens` and `model_flops` of a step are logged as `tokens_per_second` and,
    if the chip's peak is known, `mfu`. `shown` maps metrics to the short names that the progress
    bar shows. Before each checkpoint that gets a score, `measure(state)` is called, and the metrics
    that it returns are logged as well. Steps up to `ranked_after` are a phase of their own, without
    scores.
    """

    config: Config
    workdir: pathlib.Path
    description: str
    shown: dict[str, str]
    kept: Sequence[Kept] = ()
    measure: Callable[[TrainState], dict[str, float]] | None = None
    steps: int = 0  # 0: config.steps
    ranked_after: int = 0

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.workdir, self.config.checkpoint)
        self.samples: SamplesWriter | None = None
        self._compilations = Compilations()
        self._scores = np.zeros(2)  # sum and number of scores since the last scored checkpoint
        self._skipped = 0  # steps skipped since the run started or resumed
        self._skipping = False  # whether the last step was skipped

    def restore(self, state: TrainState) -> TrainState:
        """Opens the logs; returns the newest checkpoint's state, or `state` if the run is new.

        If there is a checkpoint, the parts in `kept` are restored too.
        """
        state = place_parameters(state)
        restored = self.checkpoints.restore(self._saved(state))
        if restored is not None:
            host = jax.tree.map(np.asarray, restored["host"])
            for part in self.kept:
                part.load(host)
            self._scores = np.array(restored["scores"])
            state = restored["state"]
        start = int(state.step)
        self.samples = SamplesWriter(self.workdir, resume_step=start, enabled=is_primary())
        log = self.config.log
        self._writer = MetricsWriter(
            self.workdir,
            resume_step=start,
            tensorboard=log.tensorboard,
            wandb=log.wandb_project or None,
            enabled=is_primary(),
        )
        return state

    def shapes(self, shapes: Hashable) -> None:
        """Records the array shapes of the current step, before its first jitted call."""
        self._compilations.shapes = shapes

    def chosen(self, state: TrainState) -> TrainState:
        """Returns the state from which the model is written.

        If `checkpoint.final` is `best` and a checkpoint has a score, this is the state of the best
        checkpoint; otherwise it is `state`.
        """
        step = self.checkpoints.best_step() if self.config.checkpoint.final == "best" else None
        if step is None:
            return state
        return self.checkpoints.restore(self._saved(state), step)["state"]

    def good(self, state: TrainState, step: int) -> tuple[TrainState | None, int]:
        """Returns (state, step) of the newest checkpoint up to `step`, or (None, 0) without one.

        `state` gives the structure of the checkpoint's state.
        """
        with waiting("the last checkpoint"):
            self.checkpoints.wait()
        found = self.checkpoints.newest(step)
        if found is None:
            return None, 0
        return self.checkpoints.restore(self._saved(state), found)["state"], found

    def run(self, state: TrainState, one_step: OneStep) -> TrainState:
        """Trains from `state` to the last step and returns the last state.

        A step is skipped if its loss, gradients or updated parameters are not finite. Raises
        Diverged after `optim.max_skipped` consecutive skipped steps, or if all steps were skipped,
        and Interrupted after a signal. While steps are skipped, no checkpoint is written, so the
        newest checkpoint is always good.
        """
        start, total = int(state.step), self._total
        stop = _StopSignals()
        pending: Pending | None = None
        phase = self.ranked_after if start < self.ranked_after else total
        progress = Progress(phase, start=start, description=self.description)
        with stop, progress as self._progress:
            last = time.monotonic()
            for step in range(start, total):
                try:
                    with self._compilations:
                        state, metrics = one_step(state, step)
                except Collapsed:
                    if pending is not None:
                        self._flush(*pending)
                    raise
                except SharedUserError as error:
                    raise self._kept_until(error, step, state, pending) from error
                if pending is not None:
                    self._flush(*pending)
                now = time.monotonic()
                metrics |= {"step_seconds": now - last} | self._compilations.of_step()
                pending = (step + 1, metrics)
                last = now
                done = step + 1 == total
                # A signal to one host stops all of them after the same step.
                signals = list(filter(None, gather(f"the end of step {step + 1}", stop.name)))
                due = done or step + 1 == self.ranked_after or self.checkpoints.due(step + 1)
                if due and self.measure is not None:
                    try:
                        metrics |= self.measure(state)
                    except SharedUserError as error:
                        raise self._kept_until(error, step + 1, state, pending) from error
                    last = time.monotonic()
                if due or signals:
                    # The log must contain every step up to that of the checkpoint.
                    self._flush(*pending)
                    pending = None
                    if not self._skipping:
                        self._save(step + 1, state, scored=due)
                if signals and not done:
                    saved = f"the state is saved in {self.checkpoints.directory}"
                    if self._skipping:
                        saved = f"steps are being skipped (last good checkpoint: {self._last_good})"
                    self.close()
                    raise Interrupted(
                        f"stopped by {signals[0]} after step {step + 1}; {saved}, and the same "
                        "command continues the run"
                    )
        with waiting("the last checkpoint"):
            self.checkpoints.wait()
        if self._skipped == total:
            raise self._diverged(f"all {total} steps")
        if is_primary():
            self._tell_skipped()
        return state

    def _kept_until(
        self, error: SharedUserError, step: int, state: TrainState, pending: Pending | None
    ) -> UserError:
        """Saves the state before the failed step; returns a UserError that names the saved step.

        Nothing is saved if the step before was skipped because it was not finite.
        """
        if pending is not None:
            self._flush(*pending)
            if not self._skipping:
                self._save(step, state, scored=False)
        self.close()
        latest = self.checkpoints.latest_step() or 0
        return UserError(f"{error} (the run in {self.workdir} is saved up to step {latest})")

    @property
    def _total(self) -> int:
        return self.steps or self.config.steps

    def close(self) -> None:
        with waiting("the last checkpoint"):
            self.checkpoints.close()
        self._writer.close()

    def _saved(self, state: TrainState) -> dict[str, Any]:
        host = {name: value for part in self.kept for name, value in part.state().items()}
        return {"state": state, "host": host, "scores": self._scores}

    def _save(self, step: int, state: TrainState, *, scored: bool) -> None:
        """Saves a checkpoint; with `scored`, it gets a score and can become the best one."""
        score = None
        if scored:
            total, count = self._scores
            score = float(total / count) if count else -math.inf
            self._scores = np.zeros(2)
        with waiting(f"the checkpoint of step {step}"):
            self.checkpoints.save(step, self._saved(state), score)

    def _note_score(self, step: int, values: dict[str, float]) -> None:
        name = self.config.best_metric
        if step <= self.ranked_after or name.lstrip("-") not in values:
            return
        score = values[name.lstrip("-")] * (-1.0 if name.startswith("-") else 1.0)
        if math.isfinite(score):
            self._scores = self._scores + (score, 1.0)

    def _flush(self, step: int, metrics: dict[str, Any]) -> None:
        with waiting(f"step {step}"):
            metrics = jax.device_get(metrics)
        values = {name: float(value) for name, value in metrics.items()}
        self._note_score(step, values)
        if "tokens" in values:
            values["tokens_per_second"] = values.pop("tokens") / values["step_seconds"]
        if "model_flops" in values:
            devices = math.prod(dataclasses.astuple(self.config.mesh))
            values |= mfu(values.pop("model_flops"), values["step_seconds"], devices)
        self._writer.write(step, values | peak_memory())
        self._progress.update(
            step, **{short: values.get(name) for name, short in self.shown.items()}
        )
        if step == self.ranked_after:
            self._progress.extend(self._total)
        self._skipping = values["skipped"] > 0
        self._skipped += self._skipping
        if values["skipped"] >= self.config.optim.max_skipped:
            raise self._diverged(f"{int(values['skipped'])} consecutive steps up to step {step}")

    def _diverged(self, where: str) -> Diverged:
        error = Diverged(
            f"the loss, the gradients or the updated parameters were not finite in {where} (last "
            f"good checkpoint: {self._last_good}); lower the learning rates config.optim.*_lr"
        )
        self.close()
        return error

    @property
    def _last_good(self) -> str:
        """The newest checkpoint, as text; it is good, because skipped steps are not saved."""
        latest = self.checkpoints.latest_step()
        return f"step {latest} in {self.checkpoints.directory}" if latest else "none was written"

    def _tell_skipped(self) -> None:
        """Prints how many steps of the whole run, including resumed parts, were skipped, if any."""
        rows = read_metrics(self.workdir)
        if skipped := sum(row.get("skipped", 0) > 0 for row in rows):
            print(
                f"Skipped {skipped} of {len(rows)} steps, because their loss, gradients or updated "
                "parameters were not finite"
            )


def peak_memory() -> dict[str, float]:
    """Returns the peak memory of this process in GiB, as metrics `memory/NAME`.

    The metrics are for the host and, if JAX knows its peak, for the process's first device.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peaks = {"memory/host_peak_gib": host / 2**30}
    device = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in device:
        peaks["memory/device_peak_gib"] = device["peak_bytes_in_use"] / 2**30
    return peaks


class _StopSignals:
    """A context manager in which SIGTERM and SIGINT request a stop after the current step.

    A second signal raises KeyboardInterrupt at once. A SIGTERM within `ECHO_SECONDS` of the first
    signal is ignored, because launchers often signal a process and then its whole group.
    """

    ECHO_SECONDS = 1.0

    def __init__(self) -> None:
        self.name, self._first = "", 0.0

    def __enter__(self) -> None:
        self._previous = {
            number: signal.signal(number, self._request)
            for number in (signal.SIGTERM, signal.SIGINT)
        }

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: object) -> None:
        now = time.monotonic()
        if self.name:
            if number == signal.SIGTERM and now - self._first < self.ECHO_SECONDS:
                return
            raise KeyboardInterrupt
        self.name, self._first = signal.Signals(number).name, now
