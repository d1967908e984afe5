"""What the progress bar and the closing table print."""

import io

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jexit.io.progress import Progress, closing_table, format_duration, format_value


def printed(total, steps, kind=None, width=120, seconds=1.0, shown=(), **options):
    """What a run prints whose steps take so many seconds each, the first one ten times.

    In a terminal of a `kind` and `width`, or in a log.
    """
    now, console = [0.0], Console(
        file=io.StringIO(), force_terminal=kind is not None, width=width, color_system=None,
        _environ={"TERM": kind or "dumb"},
    )  # fmt: skip
    with Progress(total, console=console, clock=lambda: now[0], **options) as progress:
        for step in steps:
            now[0] += seconds * (10 if step == steps[0] else 1)
            progress.update(step, **dict(shown))
    return console.file.getvalue()


def test_a_log_gets_step_eta_and_values_and_is_not_flooded(monkeypatch):
    shown = {"accuracy": jnp.float32(0.5), "depth/fraction": 0.25, "state": "[bold]x"}
    text = printed(100, [1, 2, 3], shown=shown, description="rl", interval=0.0)
    values = "accuracy 50.0 %  depth/fraction 25.0 %  state [bold]x"
    assert text.splitlines() == [
        f"rl   1/100  {values}",
        f"rl   2/100  ETA 1:38  {values}",  # the first step, which compiled, does not count
        f"rl   3/100  ETA 1:37  {values}",
    ]
    for options, lines in (
        ({"total": 1000, "steps": range(1, 1001)}, [1, 241, 481, 721, 961, 1000]),
        ({"total": 1000, "steps": range(1, 4)}, [1, 3]),  # one that stops early says where
        ({"total": 20, "steps": [1, 20], "kind": "dumb"}, [1, 20]),
    ):
        found = printed(**options, seconds=0.125, interval=30.0).splitlines()
        assert [line.split()[0] for line in found] == [f"{n}/{options['total']}" for n in lines]
    # A run that goes on is timed by its own steps.
    assert "92/100  ETA 0:24" in printed(100, [91, 92], seconds=3.0, start=90, interval=0.0)
    monkeypatch.setattr("jexit.io.progress.is_primary", lambda: False)
    assert printed(3, [1, 2, 3]) == ""  # not the first process


def test_each_phase_has_its_own_total_and_speed():
    now, console = [0.0], Console(file=io.StringIO(), width=80, color_system=None)
    with Progress(3, console=console, interval=0.0, clock=lambda: now[0]) as progress:
        for step, seconds in ((1, 60), (2, 10), (3, 10), (4, 60), (5, 1), (6, 1)):
            now[0] += seconds
            progress.update(step)
            if step == 3:
                progress.extend(100)
    found = [line.split(maxsplit=1) for line in console.file.getvalue().splitlines()]
    assert found == [
        ["1/3"], ["2/3", "ETA 0:10"], ["3/3"],
        ["4/100"], ["5/100", "ETA 1:35"], ["6/100", "ETA 1:34"],
    ]  # fmt: skip


def test_a_metric_that_a_phase_does_not_have_disappears():
    console = Console(file=io.StringIO(), width=80, color_system=None)
    with Progress(3, console=console, interval=0.0) as progress:
        progress.update(1, loss=0.5, depth=3)
        progress.update(2, loss=0.25)
        progress.update(3, depth=None)
    lines = console.file.getvalue().splitlines()
    assert [line.partition("loss")[2] for line in lines] == [
        " 0.500  depth 3", " 0.250  depth 3", " 0.250",
    ]  # fmt: skip


def test_a_terminal_shows_one_live_line():
    shown = {"loss": 0.5} | {f"metric_{i}": 1.0 for i in range(9)}
    for width in (50, 100):
        text = printed(20, [1, 20], "xterm", width, shown=shown, description="rl")
        final = text.replace("\x1b[2K", "").split("\r")[-1]
        assert final.startswith("rl ") and final.count("\n") == 1
        assert "20/20" in final and "ETA 0:00" in final
        assert width == 50 or "loss 0.500" in final  # metrics give way first


def test_values_and_the_closing_table_read_well():
    for name, value, text in (
        ("depth/fraction", np.float32(0.5), "50.0 %"),
        ("held-out accuracy", 1.0, "100.0 %"),
        ("loss", 12.345, "12.35"),
        ("tokens_per_second", 12345.6, "12345.6"),
        ("lr", 1e-5, "1.00e-05"),
        ("trajectories", 512, "512"),
        ("loss", float("nan"), "-"),
        ("loss", float("inf"), "inf"),
    ):
        assert format_value(name, value) == text
    assert [format_duration(s) for s in (0, 59.6, 36061)] == ["0:00", "1:00", "10:01:01"]
    console = Console(file=io.StringIO(), width=120)
    rows = [("accuracy", 0.5, 0.75), ("depth/mean", 8.0, 4.5), ("policy", "full", "sample")]
    closing_table([*rows, ("kl", None, 0.1)], "sums, held out", console=console)
    text = console.file.getvalue()
    assert text.isascii() and text.splitlines()[0].strip() == "sums, held out"
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["accuracy", "50.0 %", "75.0 %", "+25.0 points"] in cells
    assert ["depth/mean", "8.000", "4.500", "-3.500"] in cells
    assert ["policy", "full", "sample", ""] in cells
    assert ["kl", "-", "0.100", ""] in cells
