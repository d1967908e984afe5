"""Keeps an evaluation's finished policies, so that one that was stopped continues after them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from jexit.dist import barrier, from_primary, is_primary
from jexit.evaluation.accuracy import Examination
from jexit.evaluation.compare import problem_names
from jexit.results import PolicyResult, Record
from jexit.tasks import Attempt


class FinishedPolicy(Record):
    """One policy's results and attempts, the model's fingerprint, and hashes of the problems."""

    model: str
    problems: list[str]
    result: PolicyResult
    attempts: list[Attempt]


@dataclasses.dataclass(frozen=True)
class FinishedPolicies:
    """The finished policies of one evaluation, each in a file `directory`/POLICY.json.

    `model` is the fingerprint of the model. A policy that was evaluated with another model or on
    other problems does not count as finished.
    """

    directory: Path
    model: str
    examination: Examination

    def read(self, policy: str) -> tuple[PolicyResult, list[Attempt]] | None:
        """Returns the results and the attempts of `policy`, or None if it is not finished.

        Every host reads the file. Raises UserError if the file is damaged.
        """
        path = self._path(policy)
        if not from_primary("the finished policies", path.exists()):
            return None
        found = FinishedPolicy.read(path)
        barrier(f"reading {path.name}")  # before the primary host may remove it
        same = (found.model, found.problems) == (self.model, self._problems)
        return (found.result, found.attempts) if same else None

    def write(self, policy: str, result: PolicyResult, attempts: Sequence[Attempt]) -> None:
        if not is_primary():
            return
        names, attempts = self._problems, [*attempts]
        record = FinishedPolicy(model=self.model, problems=names, result=result, attempts=attempts)
        record.write(self._path(policy))

    def clear(self) -> None:
        if is_primary():
            shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, policy: str) -> Path:
        return self.directory / f"{policy}.json"

    @property
    def _problems(self) -> list[str]:
        return problem_names(self.examination.problems)
