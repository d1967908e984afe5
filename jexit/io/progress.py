"""Shows the progress of a run, and a table of the metrics before and after the run."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column, Table

from jexit.dist import is_primary

# The ETA is estimated from the steps of the last ETA_SECONDS. The first step, which compiles, is
# never counted.
ETA_SECONDS = 3600.0
LOG_WIDTH = 120


class Progress(contextlib.AbstractContextManager):
    """Shows how many steps of a run are finished, the estimated time left, and the latest metrics.

    In a terminal that supports redrawing, the display is one live line. Elsewhere (a log,
    `TERM=dumb`), a line is printed for the first update, then at most every `interval` seconds, and
    for the last step. Only the primary host shows anything.

        with Progress(total=100, description="rl") as progress:
            progress.update(step, accuracy=0.8, **{"depth/fraction": 0.5})

    `start` is the number of steps that were finished before this run resumed. `clock` returns
    monotonic time in seconds; tests replace it.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        description: str = "",
        *,
        interval: float = 30.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or _default_console()
        self._enabled = is_primary()
        self._live = self._enabled and self._console.is_interactive
        self._interval = interval
        self._clock = clock
        self._shown: dict[str, Any] = {}
        self._printed: tuple[int, float] | None = None  # the last line's step and time
        self._bar = RichProgress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[eta]}"),
            # Only the metrics give way where the terminal is narrow.
            TextColumn(
                "[cyan]{task.fields[shown]}",
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            expand=True,
            console=self._console,
            refresh_per_second=4,
            speed_estimate_period=ETA_SECONDS,
            get_time=clock,
        )
        self._bar.add_task(description, total=total, completed=start, eta="", shown="")
        (self._task,) = self._bar.tasks

    def update(self, step: int, **shown: Any) -> None:
        """Records that `step` steps are finished, and displays the metrics `shown`.

        Metrics that are not passed keep the value of an earlier call; None removes a metric.
        """
        if not self._enabled:
            return
        self._shown |= shown
        self._shown = {name: v for name, v in self._shown.items() if v is not None}
        self._bar.update(self._task.id, completed=step)
        left = self._task.time_remaining
        self._bar.update(
            self._task.id,
            eta="" if left is None else f"ETA {format_duration(left)}",
            shown="  ".join(f"{name} {format_value(name, v)}" for name, v in self._shown.items()),
        )
        if self._live:
            return
        due = self._printed is None or self._clock() - self._printed[1] >= self._interval
        if due or self._task.finished:
            self._print_line()

    def extend(self, total: int) -> None:
        """Goes on to `total` steps. The time left is then estimated from the following steps."""
        self._bar.reset(self._task.id, total=total, completed=int(self._task.completed))

    def __enter__(self) -> Self:
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._bar.stop()
        elif self._printed and self._printed[0] != self._task.completed:
            self._print_line()  # a run that stops early still shows its last step

    def _print_line(self) -> None:
        task = self._task
        done = f"{task.completed:>{len(str(task.total))}}/{task.total}"
        eta = "" if task.finished else task.fields["eta"]
        parts = (f"{task.description} {done}".strip(), eta, task.fields["shown"])
        self._console.print("  ".join(part for part in parts if part), **_PLAIN)
        self._printed = (task.completed, self._clock())


def closing_table(
    rows: Sequence[tuple[str, Any, Any]],
    title: str = "",
    *,
    console: Console | None = None,
) -> None:
    """Prints a table with the value of each metric before and after a run, and the difference.

    Each row is `(name, before, after)`; see `format_value`. If the output is not a terminal, the
    table is ASCII without colours.
    """
    console = console or _default_console()
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII2,
    )
    table.add_column("", no_wrap=True)
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, before, after in rows:
        shown = format_value(name, before), format_value(name, after)
        table.add_row(name, *shown, _change(name, before, after))
    console.print(table)


def format_value(name: str, value: Any) -> str:
    """Formats the value of the metric `name` for display.

    A fraction (see `is_share`) is formatted in per cent, an integer below a million in full, a
    number below 0.001 or from a million on in scientific notation, and any other number with one to
    three decimals. A string is returned unchanged. NaN, None and other objects become "-".
    """
    number = _number(value)
    if number is None:
        return value if isinstance(value, str) else "-"
    if not math.isfinite(number):
        return "-" if math.isnan(number) else str(number)
    if is_share(name):
        return f"{100 * number:.1f} %"
    if float(number).is_integer() and abs(number) < 1e6 and not isinstance(value, float):
        return str(int(number))
    magnitude = abs(number)
    if magnitude != 0 and (magnitude < 1e-3 or magnitude >= 1e6):
        return f"{number:.2e}"
    return f"{number:.{3 if magnitude < 10 else 2 if magnitude < 100 else 1}f}"


def is_share(name: str) -> bool:
    """Returns whether the metric `name` is a fraction from 0 to 1, which is shown in per cent.

    The whole name or its last part decides, such as `fraction` in `depth/fraction`.
    """
    last = name.lower().split("/")[-1].split(" ")[-1]
    return last in _SHARES or name.lower() in _SHARES


def format_duration(seconds: float) -> str:
    """Formats a duration, rounded to seconds, as `m:ss`, or as `h:mm:ss` from one hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


_SHARES = frozenset(
    ("accuracy", "fraction", "truncated", "completion/truncated", "groups/zero_std")
)
# rich would otherwise wrap lines, colour numbers and read [brackets] as markup.
_PLAIN: Mapping[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}


def _change(name: str, before: Any, after: Any) -> str:
    first, last = _number(before), _number(after)
    if first is None or last is None or not math.isfinite(last - first):
        return ""
    difference = last - first
    if is_share(name):
        return f"{100 * difference:+.1f} points"
    text = format_value("", difference if isinstance(difference, float) else float(difference))
    return text if text.startswith("-") else f"+{text}"


def _number(value: Any) -> float | int | None:
    """Returns the number in a Python, NumPy or JAX scalar, or None for any other value."""
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value


def _default_console() -> Console:
    console = Console()
    if not console.is_terminal:
        # Without a terminal rich assumes 80 columns, which wraps lines that fit into a log.
        console = Console(width=LOG_WIDTH)
    return console
