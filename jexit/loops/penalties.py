"""Schedules of λ and μ, and the watch for three failures: collapse, shut exits, text collapse."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from absl import logging

from jexit.config import RLConfig
from jexit.losses.rloo import depth_cost, rewards
from jexit.steps.rl import Penalties
from jexit.tasks import Attempt

FLOOR_PENALTY = 100.0  # reward a unit of accuracy under the floor: a point of it outweighs layers
ACCURACY_DECAY = 0.8  # of the moving average that the floor is held against
PATIENCE = 5  # updates that a collapse lasts before the run stops


@dataclasses.dataclass(frozen=True)
class AccuracyFloor:
    """The accuracy that λ and μ must not cost, of rollouts and of held-out problems; 0: none.

    `length` is that of the rollouts whose accuracy it is a share of, in tokens; 0: of none.
    """

    rollouts: float
    held_out: float
    length: float = 0.0

    @classmethod
    def absolute(cls, rl: RLConfig) -> AccuracyFloor:
        return cls(rl.accuracy_floor, rl.accuracy_floor)


@dataclasses.dataclass
class PenaltySchedule:
    """λ and μ of the next update: warmed up, and withheld while accuracy is under the floor.

    With `dual_ascent` one multiplier in [0, 1] climbs by `dual_rate` an update while the moving
    average of accuracy is at or over the floor and falls by it otherwise (projected dual ascent on
    the constraint accuracy ≥ floor).
    """

    config: RLConfig
    floor: AccuracyFloor
    accuracy: float = float("nan")
    multiplier: float = 0.0

    def penalties(self, step: int) -> Penalties:
        share = self.share(step)
        return Penalties(
            np.float32(share * self.config.depth_coef), np.float32(share * self.config.length_coef)
        )

    def share(self, step: int) -> float:
        """The part of λ and μ in force at update `step` (counted from 0)."""
        rl = self.config
        if rl.dual_ascent:
            return self.multiplier
        ramp = min(1.0, (step + 1) / rl.warmup_steps) if rl.warmup_steps else 1.0
        floor = self.floor.rollouts
        under_floor = floor > 0 and not self.accuracy >= floor
        return 0.0 if under_floor else ramp

    def observe(self, accuracy: float) -> None:
        """Takes in the accuracy of one batch of rollouts."""
        self.accuracy = _moved(self.accuracy, accuracy)
        over = self.accuracy >= self.floor.rollouts
        change = self.config.dual_rate if over else -self.config.dual_rate
        self.multiplier = float(np.clip(self.multiplier + change, 0.0, 1.0))

    def state(self) -> dict[str, np.ndarray]:
        values = [self.accuracy, self.multiplier, *dataclasses.astuple(self.floor)]
        return {"penalties": np.asarray(values, np.float64)}

    def load(self, state: dict[str, np.ndarray]) -> None:
        self.accuracy, self.multiplier, *floor = (float(value) for value in state["penalties"])
        self.floor = AccuracyFloor(*floor)


def penalised_reward(
    rl: RLConfig, floor: float, completions: Sequence[Attempt], layers: int
) -> float:
    """Mean reward of completions at the full λ and μ, whatever a schedule has reached by now.

    Verifier, depth and length as `losses.rloo.rewards` has them, without the KL to the teacher.
    Every point of accuracy under `floor` subtracts 1, so that of models above the floor the one
    with the lowest cost is best, and of models below it the most accurate.
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
    """Warns, once each, of collapse, of shut exits and of text that shrinks away.

    Collapse: nearly every token at the first exit while accuracy has halved. Text collapse:
    completions under 0.4 of the length that those of the floor had, or the first ones, with an
    accuracy under half of the floor or of the best. Shut exits: hardly a token leaves. Accuracy and
    length are moving averages. With `stops`, one of the first two that lasts for `PATIENCE` updates
    is a reason to stop.
    """

    first_exit_fraction: float
    schedule: PenaltySchedule  # which takes in an update before this does
    stops: bool = False
    best_accuracy: float = 0.0
    length: float = float("nan")
    first_length: float = 0.0
    good_step: int = 0  # the last at which accuracy and length were about what they had been
    failing: int = 0  # updates in a row
    warned: set[str] = dataclasses.field(default_factory=set)

    _STORED = ("best_accuracy", "length", "first_length", "good_step", "failing")

    def state(self) -> dict[str, np.ndarray]:
        return {"watch": np.asarray([getattr(self, name) for name in self._STORED], np.float64)}

    def load(self, state: dict[str, np.ndarray]) -> None:
        for name, value in zip(self._STORED, state["watch"], strict=True):
            setattr(self, name, type(getattr(self, name))(value))

    def observe(self, step: int, depth_fraction: float, length: float) -> str:
        """Takes in an update's rollouts; returns why the run should stop, or nothing."""
        accuracy, floor = self.schedule.accuracy, self.schedule.floor
        self.length = _moved(self.length, length)
        self.best_accuracy = max(self.best_accuracy, accuracy)
        self.first_length = self.first_length or length
        due_length = floor.length or self.first_length
        worse = accuracy < 0.5 * self.best_accuracy
        short = self.length < 0.4 * due_length
        shallow = depth_fraction < self.first_exit_fraction + 0.05
        failures = {
            "collapse: nearly every token leaves at the first exit and accuracy has halved; "
            "lower config.rl.depth_coef, raise config.rl.warmup_steps or set "
            "config.rl.accuracy_floor": shallow and worse,
            "text collapse: completions have shrunk and accuracy has halved; lower "
            "config.rl.length_coef or bring it in later, and make no answer cost no more than a "
            "wrong one (config.task.reward_none)": short
            and accuracy < 0.5 * max(self.best_accuracy, floor.rollouts),
        }
        shut = {
            "shut exits: hardly a token leaves early; raise config.rl.min_hazard or "
            "config.rl.depth_entropy_coef, or calibrate with config.sft.explore": depth_fraction
            > 0.995,
        }
        for message in sorted(text for text, holds in (failures | shut).items() if holds):
            if message not in self.warned:
                logging.warning("Step %d: %s.", step, message)
                self.warned.add(message)
        failed = [text for text, holds in failures.items() if holds]
        self.failing = self.failing + 1 if failed else 0
        if accuracy >= 0.8 * self.best_accuracy and self.length >= 0.6 * due_length:
            self.good_step = step
        return failed[0] if self.stops and self.failing >= PATIENCE else ""


def _moved(average: float, value: float) -> float:
    return value if np.isnan(average) else ACCURACY_DECAY * average + (1 - ACCURACY_DECAY) * value
