"""Runs the combinations of a sweep as processes of `jexit.main`."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO

from jexit.errors import UserError
from jexit.io.files import disk_errors, take_lock
from jexit.sweep.plan import Cell, Sweep

COMPILED = ".compiled"  # the directory of JAX's compilation cache, among the runs
HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Runner:
    """Runs the combinations of `sweep` as processes, and terminates the processes at a signal.

    `stopped` is the name of the signal that stopped the sweep, or an empty string. Raises UserError
    if the sweep has more simultaneous jobs than there are CPU cores.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self._idle = shares(sweep.jobs)
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self.stopped = ""

    def run(self, cells: Sequence[Cell]) -> list[str]:
        """Runs every process that the combinations `cells` still need.

        Returns a message for each combination that failed or that another command is running.
        """

        def one(cell: Cell) -> str | None:
            if self.stopped:
                return None
            with self._lock:
                cores = self._idle.pop()
            try:
                return self._cell(cell, cores)
            finally:
                with self._lock:
                    self._idle.append(cores)

        before = {number: signal.getsignal(number) for number in HANDED_ON}
        for number, handler in before.items():
            if number != signal.SIGHUP or handler != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._stop)
        try:
            with concurrent.futures.ThreadPoolExecutor(self.sweep.jobs) as pool:
                return [line for line in pool.map(one, cells) if line]
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _: object) -> None:
        self.stopped = signal.Signals(number).name
        for process in list(self._running):
            process.send_signal(signal.SIGTERM)

    def _cell(self, cell: Cell, cores: Sequence[int]) -> str | None:
        with disk_errors(cell.log):
            cell.log.parent.mkdir(parents=True, exist_ok=True)
        with open(cell.log, "a") as log:
            try:
                # The runs inherit the lock with the log file, so the lock is held as long as one of
                # them lives, even if the sweep has ended.
                if not take_lock(log, "choose an --into on another file system"):
                    return f"{cell.name} is being run by another command; wait for it, or stop it"
            except UserError as error:
                return str(error)
            failure = None
            commands = self.sweep.commands(cell)
            while not self.stopped and (arguments := next(commands, None)):
                with self._lock:  # a line of its own
                    print(f"{cell.name}: {arguments[0]}", flush=True)
                code = self._process(arguments, log, cores)
                if code and not self.stopped:
                    failure = f"{cell.name} ended with exit code {code}: {cell.last_word}"
                    if not cell.finished:
                        break
        return failure

    def _process(self, arguments: Sequence[str], log: IO[str], cores: Sequence[int]) -> int:
        # In its own process group, so that it gets a Ctrl-C only once, from here.
        process = subprocess.Popen(
            [sys.executable, "-m", "jexit.main", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self._compiled_once() | os.environ,
            start_new_session=True,
        )
        if cores:
            os.sched_setaffinity(process.pid, cores)
        with self._lock:
            self._running.add(process)
        if self.stopped:  # the signal came before the process started
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._running.discard(process)

    def _compiled_once(self) -> dict[str, str]:
        """Returns the environment variables with which runs share their compiled programs.

        Runs of a sweep mostly differ in numbers, so nearly all of them need the same programs.
        """
        return {
            "JAX_COMPILATION_CACHE_DIR": str((self.sweep.into / COMPILED).resolve()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }


def shares(jobs: int) -> list[Sequence[int]]:
    """Divides the CPU's cores into disjoint sets, one for each of `jobs` simultaneous jobs.

    The sets are empty for a single job, or on a system that does not list the cores of a process.
    Raises UserError if there are fewer cores than jobs.
    """
    if jobs == 1 or not hasattr(os, "sched_getaffinity"):
        return [()] * jobs
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < jobs:
        raise UserError(
            f"--jobs is {jobs}, but only {len(cores)} cores are available; give at most "
            f"{len(cores)}"
        )
    return [cores[share::jobs] for share in range(jobs)]
