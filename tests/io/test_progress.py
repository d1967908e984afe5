"""What the progress bar and the closing table print."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jexit.io.progress import Progress, closing_table, format_duration, format_value


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def log_console():
    return Console(file=io.StringIO(), force_terminal=False, width=120)


def terminal(width, kind="xterm"):
    """`kind` is what TERM says there, whatever it says where the tests run."""
    return Console(
        file=io.StringIO(),
        force_terminal=True,
        width=width,
        color_system=None,
        _environ={"TERM": kind},
    )


def printed(console):
    return console.file.getvalue().splitlines()


def run(progress, clock, steps, seconds=1.0, **shown):
    with progress:
        for step in steps:
            clock.now += seconds
            progress.update(step, **shown)


def test_a_log_gets_step_eta_and_values():
    console, clock = log_console(), Clock()
    progress = Progress(100, description="rl", interval=0.0, console=console, clock=clock)
    run(progress, clock, [1, 2], 2.0, accuracy=jnp.float32(0.5), **{"depth/fraction": 0.25})
    assert printed(console) == [
        "rl   1/100  ETA 3:18  accuracy 50.0 %  depth/fraction 25.0 %",
        "rl   2/100  ETA 3:16  accuracy 50.0 %  depth/fraction 25.0 %",
    ]


def test_a_log_is_not_flooded():
    console, clock = log_console(), Clock()
    progress = Progress(1000, interval=30.0, console=console, clock=clock)
    run(progress, clock, range(1, 1001), 0.125, loss=1.0)  # 125 seconds
    assert [line.split()[0] for line in printed(console)] == [
        "1/1000",
        "241/1000",
        "481/1000",
        "721/1000",
        "961/1000",
        "1000/1000",
    ]
    assert "ETA" not in printed(console)[-1]


def test_a_run_that_stops_early_still_says_where():
    console, clock = log_console(), Clock()
    progress = Progress(1000, interval=30.0, console=console, clock=clock)
    with pytest.raises(KeyboardInterrupt), progress:
        for step in (1, 2, 3):
            progress.update(step)
        raise KeyboardInterrupt
    assert [line.split()[0] for line in printed(console)] == ["1/1000", "3/1000"]


def test_the_eta_forgets_the_step_that_compiled():
    clock = Clock()
    progress = Progress(101, console=log_console(), clock=clock)
    assert progress.eta_seconds is None
    with progress:
        clock.now += 60.0
        progress.update(1)
        assert progress.eta_seconds == 6000.0
        clock.now += 1.0
        progress.update(2)
        assert progress.eta_seconds == 99.0
        clock.now += 2.0  # a slower step counts a tenth
        progress.update(3)
        assert progress.eta_seconds == pytest.approx(98 * 1.1)


def test_a_resumed_run_counts_its_own_steps_only():
    clock = Clock()
    progress = Progress(100, start=90, console=log_console(), clock=clock)
    run(progress, clock, [91, 92], 3.0)
    assert progress.eta_seconds == pytest.approx(8 * 3.0)


def test_nothing_is_printed_when_it_is_not_the_first_process():
    console, clock = log_console(), Clock()
    run(Progress(3, enabled=False, console=console, clock=clock), clock, [1, 2, 3])
    assert printed(console) == []


def test_brackets_in_values_are_printed_as_they_are():
    console, clock = log_console(), Clock()
    run(Progress(1, console=console, clock=clock), clock, [1], state="[bold]x")
    assert printed(console) == ["1/1  state [bold]x"]


def test_a_terminal_shows_one_live_line():
    console, clock = terminal(100), Clock()
    run(Progress(20, description="rl", console=console, clock=clock), clock, [1, 20], loss=0.5)
    final = console.file.getvalue().replace("\x1b[2K", "").split("\r")[-1]
    assert final.splitlines()[0].startswith("rl ") and final.count("\n") == 1
    assert "20/20" in final and "loss 0.500" in final and "ETA 0:00" in final


def test_a_narrow_terminal_keeps_step_and_eta():
    console, clock = terminal(50), Clock()
    shown = {f"metric_{i}": 1.0 for i in range(9)}
    run(Progress(20, description="rl", console=console, clock=clock), clock, [1, 20], **shown)
    final = console.file.getvalue().replace("\x1b[2K", "").split("\r")[-1]
    assert "20/20" in final and "ETA 0:00" in final and final.count("\n") == 1


def test_a_terminal_that_cannot_redraw_gets_the_lines_of_a_log():
    console, clock = terminal(80, "dumb"), Clock()
    run(Progress(20, description="rl", console=console, clock=clock), clock, [1, 20], loss=0.5)
    assert printed(console) == ["rl  1/20  ETA 0:19  loss 0.500", "rl 20/20  loss 0.500"]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("accuracy", 0.8125, "81.2 %"),
        ("depth/fraction", np.float32(0.5), "50.0 %"),
        ("held-out accuracy", 1.0, "100.0 %"),
        ("loss", 0.12345, "0.123"),
        ("loss", 12.345, "12.35"),
        ("tokens_per_second", 12345.6, "12345.6"),
        ("lr", 1e-5, "1.00e-05"),
        ("loss", 0.0, "0.000"),
        ("trajectories", 512, "512"),
        ("loss", float("nan"), "-"),
        ("loss", float("inf"), "inf"),
        ("verdict", "right", "right"),
        ("loss", None, "-"),
    ],
)
def test_values_read_well(name, value, text):
    assert format_value(name, value) == text


def test_durations():
    assert [format_duration(s) for s in (0, 59.6, 61, 3600, 36061)] == [
        "0:00",
        "1:00",
        "1:01",
        "1:00:00",
        "10:01:01",
    ]


def test_the_closing_table_compares_before_and_after():
    console = log_console()
    rows = [("accuracy", 0.5, 0.75), ("depth/mean", 8.0, 4.5), ("policy", "full", "sample")]
    closing_table([*rows, ("kl", None, 0.1)], "sums, held out", console=console)
    text = console.file.getvalue()
    assert text.isascii()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["accuracy", "50.0 %", "75.0 %", "+25.0 points"] in cells
    assert ["depth/mean", "8.000", "4.500", "-3.500"] in cells
    assert ["policy", "full", "sample", ""] in cells
    assert ["kl", "-", "0.100", ""] in cells
    assert text.splitlines()[0].strip() == "sums, held out"
