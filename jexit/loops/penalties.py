"""Schedules the coefficients λ (depth) and μ (length) of the RL penalties; detects failing runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from absl import logging

from jexit.config import RLConfig
from jexit.losses.rloo import depth_cost, rewards
from jexit.steps.rl import Penalties
from jexit.tasks import Attempt

FLOOR_PENALTY = 100.0  # reward lost per unit of accuracy below the floor: 1 per percentage point
ACCURACY_DECAY = 0.8  # of the moving average that is compared with the floor
PATIENCE = 5  # consecutive updates with a collapse after which the run stops


@dataclasses.dataclass(frozen=True)
class AccuracyFloor:
    """The lowest accuracy that the depth and length penalties must preserve (0: no floor).

    `rollouts` is the floor for training rollouts, and `held_out` the floor for held-out problems.
    If the floors are a fraction of the initial model's accuracy, `length` is the mean length of
    that model's completions in tokens; otherwise it is 0.
    """

    rollouts: float
    held_out: float
    length: float = 0.0


@dataclasses.dataclass
class PenaltySchedule:
    """Computes the coefficients λ (depth) and μ (length) of the RL penalties for the next update.

    Without `dual_ascent`, λ and μ are 0 while accuracy, a moving average over updates, is below the
    floor or not known yet. Otherwise they rise linearly over the warm-up, which counts the updates
    that reached the floor. With `dual_ascent`, a
    multiplier in [0, 1] scales λ and μ. It rises by `dual_rate` per update while accuracy is at or
    above the floor, and falls by `dual_rate` otherwise (projected dual ascent on the constraint
    accuracy ≥ floor).
    """

    config: RLConfig
    floor: AccuracyFloor
    accuracy: float = float("nan")
    multiplier: float = 0.0
    reached: int = 0  # updates after which accuracy was not below the floor

    def penalties(self) -> Penalties:
        share = self.share()
        return Penalties(
            np.float32(share * self.config.depth_coef), np.float32(share * self.config.length_coef)
        )

    def share(self) -> float:
        """Returns the factor in [0, 1] that scales λ and μ at the next update."""
        rl = self.config
        if rl.dual_ascent:
            return self.multiplier
        ramp = min(1.0, (self.reached + 1) / rl.warmup_steps) if rl.warmup_steps else 1.0
        floor = self.floor.rollouts
        under_floor = floor > 0 and not self.accuracy >= floor
        return 0.0 if under_floor else ramp

    def observe(self, accuracy: float) -> None:
        """Updates the moving average and what follows from it with one batch's `accuracy`."""
        self.accuracy = _moved(self.accuracy, accuracy)
        over = self.accuracy >= self.floor.rollouts
        self.reached += over
        change = self.config.dual_rate if over else -self.config.dual_rate
        self.multiplier = float(np.clip(self.multiplier + change, 0.0, 1.0))

    def state(self) -> dict[str, np.ndarray]:
        values = [self.reached, self.accuracy, self.multiplier, *dataclasses.astuple(self.floor)]
        return {"penalties": np.asarray(values, np.float64)}

    def load(self, state: dict[str, np.ndarray]) -> None:
        reached, self.accuracy, self.multiplier, *floor = map(float, state["penalties"])
        self.reached, self.floor = int(reached), AccuracyFloor(*floor)


def penalised_reward(
    rl: RLConfig, floor: float, completions: Sequence[Attempt], layers: int
) -> float:
    """Returns the mean reward of `completions`, minus a penalty for accuracy below `floor`.

    The reward is computed as in `losses.rloo.rewards`, but without the KL to the teacher and with
    the configured λ and μ, not the scheduled ones. Each percentage point of accuracy below `floor`
    subtracts 1. Models above the floor are therefore ranked by reward, and models below it mainly
    by accuracy.
    """
    lengths_J1 = np.asarray([[len(completion.depths)] for completion in completions])
    depth_JW = np.zeros((len(completions), lengths_J1.max()))
    for row, completion in enumerate(completions):
        depth_JW[row, : len(completion.depths)] = completion.depths
    index_W = np.arange(depth_JW.shape[1])
    token_JW = (index_W < lengths_J1).astype(np.float32)
    cost_J = depth_cost(
        depth_JW / layers,
        token_JW * (index_W > 0),
        token_JW,
        norm=rl.depth_norm,
        length_ref=rl.length_ref,
    )
    reward = rewards(
        np.asarray([made.verdict.reward for made in completions if made.verdict]),
        cost_J,
        np.zeros_like(token_JW),
        token_JW,
        depth_coef=rl.depth_coef,
        kl_coef=0.0,
        length_coef=rl.length_coef,
        length_ref=rl.length_ref,
    )
    accuracy = np.mean([completion.correct for completion in completions])
    missing = max(0.0, floor - float(accuracy))
    return float(reward.total_J.mean()) - FLOOR_PENALTY * missing


@dataclasses.dataclass
class FailureWatch:
    """Detects collapse, text collapse and shut exits in RL, and logs one warning for each.

    - Collapse: nearly every token leaves at the first exit, and accuracy is below half of the best.
    - Text collapse: the mean length of completions is below 0.4 of `floor.length` (or of the first
      batch's mean length, if `floor.length` is 0), and accuracy is below half of the best or of the
      floor, whichever is higher.
    - Shut exits: hardly any token leaves early.

    Accuracy and length are moving averages. With `stops`, the run should stop after a collapse or
    text collapse in `PATIENCE` consecutive updates.
    """

    first_exit_fraction: float
    schedule: PenaltySchedule  # must observe each update before this watch does
    stops: bool = False
    best_accuracy: float = 0.0
    length: float = float("nan")
    first_length: float = 0.0
    good_step: int = 0  # the last step whose model had nearly its earlier accuracy and length
    failing: int = 0  # consecutive updates with a collapse
    warned: set[str] = dataclasses.field(default_factory=set)

    _STORED = ("best_accuracy", "length", "first_length", "good_step", "failing")

    def state(self) -> dict[str, np.ndarray]:
        return {"watch": np.asarray([getattr(self, name) for name in self._STORED], np.float64)}

    def load(self, state: dict[str, np.ndarray]) -> None:
        for name, value in zip(self._STORED, state["watch"], strict=True):
            setattr(self, name, type(getattr(self, name))(value))

    def observe(self, step: int, accuracy: float, depth_fraction: float, length: float) -> str:
        """Records the rollouts of update `step`; returns the reason to stop the run, or "".

        The rollouts have this `accuracy`, and were made by the model after update `step` − 1.
        `depth_fraction` is mean depth / layers, and `length` the mean number of tokens.
        """
        average, floor = self.schedule.accuracy, self.schedule.floor
        self.length = _moved(self.length, length)
        self.best_accuracy = max(self.best_accuracy, average)
        self.first_length = self.first_length or length
        due_length = floor.length or self.first_length
        worse = average < 0.5 * self.best_accuracy
        short = self.length < 0.4 * due_length
        shallow = depth_fraction < self.first_exit_fraction + 0.05
        failures = {
            "collapse: nearly every token leaves at the first exit and accuracy has halved; "
            "lower config.rl.depth_coef, raise config.rl.warmup_steps or set "
            "config.rl.accuracy_floor": shallow and worse,
            "text collapse: completions have shrunk and accuracy has halved; lower "
            "config.rl.length_coef or raise config.rl.warmup_steps, and raise "
            "config.task.reward_none to at least config.task.reward_wrong": short
            and average < 0.5 * max(self.best_accuracy, floor.rollouts),
        }
        shut = {
            "shut exits: hardly any token leaves early; raise config.rl.min_hazard or "
            "config.rl.depth_entropy_coef, or calibrate with "
            "config.sft.explore above 0": depth_fraction > 0.995,
        }
        for message in sorted(text for text, holds in (failures | shut).items() if holds):
            if message not in self.warned:
                logging.warning("Step %d: %s.", step, message)
                self.warned.add(message)
        failed = [text for text, holds in failures.items() if holds]
        self.failing = self.failing + 1 if failed else 0
        # Averages lag behind a sudden collapse, and single batches are noisy: both must be good.
        accurate = min(average, accuracy) >= 0.9 * self.best_accuracy
        if accurate and min(self.length, length) >= 0.6 * due_length:
            self.good_step = step - 1
        return failed[0] if self.must_stop else ""

    @property
    def must_stop(self) -> bool:
        """Whether the run should stop, also after it was resumed."""
        return self.stops and self.failing >= PATIENCE


def _moved(average: float, value: float) -> float:
    return value if np.isnan(average) else ACCURACY_DECAY * average + (1 - ACCURACY_DECAY) * value
