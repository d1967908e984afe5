"""λ and μ over a run, and the watch for runs that fail."""

import logging

import numpy as np
import pytest

from jexit.config import RLConfig
from jexit.loops.penalties import (
    PATIENCE,
    AccuracyFloor,
    FailureWatch,
    PenaltySchedule,
    penalised_reward,
)
from jexit.tasks import Attempt, Verdict


def schedule_of(rl):
    return PenaltySchedule(rl, AccuracyFloor(rl.accuracy_floor, rl.accuracy_floor))


def test_penalties_rise_linearly_over_the_warm_up():
    schedule = schedule_of(RLConfig(depth_coef=0.8, length_coef=0.4, warmup_steps=4))
    penalties = []
    for _ in range(6):
        penalties.append(schedule.penalties())
        schedule.observe(0.0)
    assert [float(p.depth_coef) for p in penalties] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert [float(p.length_coef) for p in penalties] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.4, 0.4]
    )


def test_penalties_are_withheld_while_average_accuracy_is_under_the_floor():
    schedule = schedule_of(RLConfig(depth_coef=1.0, accuracy_floor=0.5))
    assert schedule.share() == 0.0  # nothing is known yet
    for accuracy in (1.0, 0.0):
        schedule.observe(accuracy)
    assert schedule.accuracy == pytest.approx(0.8)
    assert schedule.share() == 1.0  # one bad batch does not lift the pressure
    for _ in range(10):
        schedule.observe(0.1)
    assert schedule.share() == 0.0


def test_the_warm_up_counts_the_updates_that_reached_the_floor():
    """A weak start would otherwise meet the whole penalty at once."""
    schedule = schedule_of(RLConfig(depth_coef=1.0, accuracy_floor=0.5, warmup_steps=4))
    shares = []
    for accuracy in (0.1, 0.1, 0.1, 0.1, 0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        schedule.observe(accuracy)
        shares.append(schedule.share())
    # Moving average: .1 five times, then .28 .424 .539 .631 .705 .764 .811
    assert shares == [0.0] * 7 + [0.5, 0.75, 1.0, 1.0, 1.0]


def test_dual_ascent_climbs_over_the_floor_and_falls_under_it():
    config = RLConfig(depth_coef=2.0, dual_ascent=True, dual_rate=0.25, accuracy_floor=0.6)
    schedule = schedule_of(config)
    shares = []
    for accuracy in (0.9, 0.9, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0):
        schedule.observe(accuracy)
        shares.append(schedule.share())
    # Moving average: .9 .9 .9 .72 .576 .461 .369 .295
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0])
    assert float(schedule.penalties().depth_coef) == 0.0


def test_its_state_survives_a_checkpoint_with_the_floor_of_the_initial_model():
    config = RLConfig(dual_ascent=True, accuracy_floor=0.9, floor_of="initial")
    schedule, restored = PenaltySchedule(config, AccuracyFloor(0.3, 0.6)), schedule_of(config)
    for accuracy in (0.7, 0.8):
        schedule.observe(accuracy)
    restored.load(schedule.state())
    assert restored == schedule and restored.floor == AccuracyFloor(0.3, 0.6)


def watch_of(stops=False, floor=None):
    return FailureWatch(0.25, PenaltySchedule(RLConfig(), floor or AccuracyFloor(0.0, 0.0)), stops)


def updates(watch, *, start, number, accuracy, **values):
    """The last answer to so many equal updates from step `start` on."""
    for index in range(number):
        watch.schedule.observe(accuracy)
        answer = watch.observe(start + index, accuracy, **values)
    return answer


GOOD = {"accuracy": 0.8, "depth_fraction": 0.6, "length": 30.0}
SHALLOW = {"accuracy": 0.1, "depth_fraction": 0.26, "length": 30.0}
SHORT = {"accuracy": 0.1, "depth_fraction": 0.6, "length": 3.0}


def test_the_log_warns_once_of_each_failure(caplog):
    shut = GOOD | {"depth_fraction": 1.0}
    for bad, name in ((SHALLOW, "collapse"), (SHORT, "text collapse"), (shut, "shut exits")):
        watch = watch_of()
        with caplog.at_level(logging.WARNING, logger="absl"):
            updates(watch, start=1, number=3, **GOOD)
            assert not caplog.records
            updates(watch, start=4, number=20, **bad)
        said = [record.getMessage().split(":")[1].strip() for record in caplog.records]
        assert said == [name]
        caplog.clear()


def test_a_collapse_that_lasts_stops_the_run_and_one_bad_batch_does_not():
    for bad in [SHALLOW, SHORT]:
        watch = watch_of(stops=True)
        assert not updates(watch, start=1, number=3, **GOOD)
        assert not updates(watch, start=4, number=1, **bad)
        assert not updates(watch, start=5, number=10, **GOOD)
        answers = [updates(watch, start=15 + index, number=1, **bad) for index in range(20)]
        first = next(index for index, answer in enumerate(answers) if answer)
        assert all(answers[first:]) and "collapse" in answers[first]
        # Averages need three or four updates to halve, and the failure has to last.
        assert PATIENCE + 2 <= first <= PATIENCE + 5
        assert watch.good_step == 13  # its rollouts are those of update 14
        assert not updates(watch_of(), start=1, number=30, **bad)


def test_a_weak_start_may_stop_rambling_but_not_stop_reasoning():
    """Never accurate, so that nothing can halve: the lengths are held against the full depth's."""
    for length in [12.0, 4.0]:
        watch = watch_of(stops=True, floor=AccuracyFloor(0.8, 0.9, length=20.0))
        updates(watch, start=1, number=3, accuracy=0.05, depth_fraction=0.4, length=38.0)
        said = updates(watch, start=4, number=30, accuracy=0.08, depth_fraction=0.4, length=length)
        assert bool(said) == (length < 8)
    # Without a floor a model that was never correct has nothing to lose.
    never = {"accuracy": 0.0, "depth_fraction": 0.25, "length": 4.0}
    assert not updates(watch_of(stops=True), start=1, number=20, **never)


def test_the_watch_goes_on_where_it_was():
    watch, resumed = watch_of(stops=True), watch_of(stops=True)
    updates(watch, start=1, number=3, **GOOD)
    updates(watch, start=4, number=6, **SHALLOW)
    for ours, theirs in ((resumed, watch), (resumed.schedule, watch.schedule)):
        ours.load({name: np.array(value) for name, value in theirs.state().items()})
    for step in range(10, 20):
        said = [updates(one, start=step, number=1, **SHALLOW) for one in (watch, resumed)]
        assert said[0] == said[1]
    assert said[0] and resumed.state()["watch"].tolist() == watch.state()["watch"].tolist()


VERDICTS = (Verdict(kind="wrong", reward=0.0), Verdict(kind="strict", reward=1.0))


def score(rl, *, correct, depths, of=10):
    """The reward of ten completions with these depths, `correct` of which are correct."""
    made = [
        Attempt(
            ids=[0] * len(depths),
            text="",
            depths=depths,
            verdict=VERDICTS[number < correct],
        )
        for number in range(of)
    ]
    return penalised_reward(rl, rl.accuracy_floor, made, 8)


def test_the_best_checkpoint_is_scored_at_the_full_penalties():
    """A run that improves while λ rises: its own reward falls, its score does not."""
    rl = RLConfig(depth_coef=2.0, length_coef=0.2, length_ref=22.0, warmup_steps=100)
    run = ((9, 8), (10, 4), (10, 2))
    scores = [score(rl, correct=correct, depths=[8, *[depth] * 4]) for correct, depth in run]
    assert scores == pytest.approx(
        [correct / 10 - 2.0 * depth / 8 - 0.2 * 5 / 22 for correct, depth in run]
    )
    in_force = [0.9 - 0.0, 1.0 - 0.5 * 2.0 * 0.5, 1.0 - 2.0 * 0.25]  # by which the first is best
    assert max(in_force) == in_force[0] and max(scores) == scores[2]


def test_the_best_checkpoint_under_a_total_penalty_is_not_the_one_with_filler():
    rl = RLConfig(depth_coef=2.0, depth_norm="total", length_ref=22.0)
    plain = score(rl, correct=10, depths=[8, 4, 4, 4, 4])
    assert plain == pytest.approx(1.0 - 2.0 * (8 + 4 * 4) / 8 / 22)
    assert score(rl, correct=10, depths=[8, 4, 4, 4, 4, 1, 1, 1, 1]) < plain


def test_accuracy_under_the_floor_outweighs_layers():
    rl = RLConfig(depth_coef=2.0, accuracy_floor=0.9)
    scores = [
        score(rl, correct=correct, depths=[8, *[depth] * 4])
        for correct, depth in ((9, 4), (9, 8), (8, 1), (7, 1))
    ]
    assert scores == sorted(scores, reverse=True)
