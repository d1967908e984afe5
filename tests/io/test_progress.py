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
        file=io.StringIO(), force_terminal=True, width=width, color_system=None,
        _environ={"TERM": kind},
    )  # fmt: skip


def printed(console):
    return console.file.getvalue().splitlines()


def run(console, total, steps, seconds=1.0, shown=(), **options):
    """A run's progress at the end, each step of so many seconds."""
    clock = Clock()
    progress = Progress(total, console=console, clock=clock, **options)
    with progress:
        for step in steps:
            clock.now += seconds
            progress.update(step, **dict(shown))
    return progress


def test_a_log_gets_step_eta_and_values_and_is_not_flooded():
    console = log_console()
    shown = {"accuracy": jnp.float32(0.5), "depth/fraction": 0.25, "state": "[bold]x"}
    run(console, 100, [1, 2], 2.0, shown, description="rl", interval=0.0)
    assert printed(console) == [
        "rl   1/100  ETA 3:18  accuracy 50.0 %  depth/fraction 25.0 %  state [bold]x",
        "rl   2/100  ETA 3:16  accuracy 50.0 %  depth/fraction 25.0 %  state [bold]x",
    ]
    console = log_console()
    run(console, 1000, range(1, 1001), 0.125, interval=30.0)  # 125 seconds
    steps = ["1/1000", "241/1000", "481/1000", "721/1000", "961/1000", "1000/1000"]
    assert [line.split()[0] for line in printed(console)] == steps
    console = log_console()  # a run that stops early still says where
    run(console, 1000, [1, 2, 3], interval=30.0)
    assert [line.split()[0] for line in printed(console)] == ["1/1000", "3/1000"]
    console = log_console()  # of a process that is not the first
    run(console, 3, [1, 2, 3], enabled=False)
    assert printed(console) == []
    console = terminal(80, "dumb")
    run(console, 20, [1, 20], shown={"loss": 0.5}, description="rl")
    assert printed(console) == ["rl  1/20  ETA 0:19  loss 0.500", "rl 20/20  loss 0.500"]


def test_the_eta_forgets_the_step_that_compiled_and_the_run_before():
    clock = Clock()
    progress = Progress(101, console=log_console(), clock=clock)
    assert progress.eta_seconds is None
    with progress:
        for step, (seconds, eta) in enumerate(((60.0, 6000.0), (1.0, 99.0), (2.0, 98 * 1.1)), 1):
            clock.now += seconds  # a slower step counts a tenth
            progress.update(step)
            assert progress.eta_seconds == pytest.approx(eta)
    assert run(log_console(), 100, [91, 92], 3.0, start=90).eta_seconds == pytest.approx(8 * 3.0)


def test_a_terminal_shows_one_live_line():
    for width in (50, 100):
        console = terminal(width)
        shown = {"loss": 0.5} | {f"metric_{i}": 1.0 for i in range(9)}
        run(console, 20, [1, 20], shown=shown, description="rl")
        final = console.file.getvalue().replace("\x1b[2K", "").split("\r")[-1]
        assert final.startswith("rl ") and final.count("\n") == 1
        assert "20/20" in final and "ETA 0:00" in final
        assert width == 50 or "loss 0.500" in final  # metrics give way first


def test_values_and_durations_read_well():
    for name, value, text in (
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
    ):
        assert format_value(name, value) == text
    durations = ["0:00", "1:00", "1:01", "1:00:00", "10:01:01"]
    assert [format_duration(s) for s in (0, 59.6, 61, 3600, 36061)] == durations


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
