"""What a person watching a run sees: a progress bar (plain lines in a log) and a closing table."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column, Table

# A step's duration counts this much in the running mean that the ETA is made of.
ETA_WEIGHT = 0.1
LOG_WIDTH = 120


class Progress:
    """Shows how far a run has come and how its metrics stand.

    In a terminal that can redraw it this is one live line. Anywhere else (a log, `TERM=dumb`), a
    line is printed for the first step, then every `interval` seconds, and for the last.

        with Progress(total=100, description="rl") as progress:
            progress.update(step, accuracy=0.8, **{"depth/fraction": 0.5})

    Args:
      total: The step at which the run is done.
      start: Steps done before, by the run that this one resumes.
      description: Put first on the line.
      interval: Seconds between plain lines.
      enabled: False shows nothing, for all processes but the first.
      console: Where to write; standard output by default.
      clock: Seconds that never go back, for tests.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        description: str = "",
        *,
        interval: float = 30.0,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._step = start
        self._description = description
        self._interval = interval
        self._enabled = enabled
        self._console = console or _default_console()
        self._clock = clock
        self._last_update: float | None = None
        self._last_line: float | None = None
        self._seconds_per_step: float | None = None
        self._timings = 0
        self._shown: dict[str, Any] = {}
        self._printed_step: int | None = None
        self._bar: RichProgress | None = None
        if enabled and self._console.is_interactive:
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
            )
            self._task = self._bar.add_task(
                description, total=total, completed=start, eta="", shown=""
            )

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the last step, or None before two steps have been timed."""
        if self._seconds_per_step is None:
            return None
        return max(self._total - self._step, 0) * self._seconds_per_step

    def update(self, step: int, **shown: Any) -> None:
        """Says that `step` steps are done, and shows the metrics given (numbers or text)."""
        if not self._enabled:
            return
        now = self._clock()
        self._time_step(step, now)
        self._step = step
        self._shown.update(shown)
        if self._bar is not None:
            self._bar.update(
                self._task, completed=step, eta=self._eta_text(), shown=self._shown_text()
            )
        elif (
            self._last_line is None
            or now - self._last_line >= self._interval
            or step >= self._total
        ):
            self._print_line(now)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        self._last_update = self._clock()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._last_line is not None and self._printed_step != self._step:
            self._print_line(self._clock())  # a run that stops early still says where

    def _time_step(self, step: int, now: float) -> None:
        """Keeps a running mean of the seconds a step takes."""
        steps = step - self._step
        if steps <= 0 or self._last_update is None:
            self._last_update = now
            return
        seconds = (now - self._last_update) / steps
        self._last_update = now
        if self._seconds_per_step is None or self._timings == 1:
            self._seconds_per_step = seconds  # the first step compiles: the second replaces it
        else:
            weight = 1.0 - (1.0 - ETA_WEIGHT) ** steps
            self._seconds_per_step += weight * (seconds - self._seconds_per_step)
        self._timings += 1

    def _eta_text(self) -> str:
        eta = self.eta_seconds
        return "" if eta is None else f"ETA {format_duration(eta)}"

    def _shown_text(self) -> str:
        return "  ".join(f"{name} {format_value(name, v)}" for name, v in self._shown.items())

    def _print_line(self, now: float) -> None:
        width = len(str(self._total))
        parts = (
            f"{self._description} {self._step:>{width}}/{self._total}".strip(),
            self._eta_text() if self._step < self._total else "",
            self._shown_text(),
        )
        self._console.print("  ".join(part for part in parts if part), **_PLAIN)
        self._last_line = now
        self._printed_step = self._step


def closing_table(
    rows: Sequence[tuple[str, Any, Any]],
    title: str = "",
    *,
    columns: tuple[str, str] = ("before", "after"),
    console: Console | None = None,
) -> None:
    """Prints what a run changed: one row a metric, `(name, before, after)`, and the difference.

    Numbers are formatted by `format_value`; text is shown as it is; None or NaN is a dash. The
    table is ASCII and uncoloured where the output is no terminal.
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
    for column in (*columns, "change"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, before, after in rows:
        table.add_row(
            name,
            format_value(name, before),
            format_value(name, after),
            _change(name, before, after),
        )
    console.print(table)


def format_value(name: str, value: Any) -> str:
    """A metric as text: shares such as accuracy in per cent, numbers to three or four digits."""
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
    """Whether a metric is a share of something, best read in per cent."""
    last = name.lower().split("/")[-1].split(" ")[-1]
    return last in _SHARES or name.lower() in _SHARES


def format_duration(seconds: float) -> str:
    """Whole seconds as `m:ss`, or `h:mm:ss` from an hour on."""
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
    """The number in a Python, NumPy or JAX scalar, or None where there is none."""
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value


def _default_console() -> Console:
    console = Console()
    if not console.is_terminal:
        # Without a terminal rich assumes 80 columns, which wraps lines that a log can hold.
        console = Console(width=LOG_WIDTH)
    return console
