"""Decodes prompts under named policies, and returns the same attempts on every host."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jexit.config import EngineSize
from jexit.data.tokenizer import Tokenizer
from jexit.dist import gather, host_rows
from jexit.evaluation.confidence import confident, is_confidence
from jexit.model.policies import Policy, Sample, policy_of
from jexit.rollout import Rollouts, rollout
from jexit.tasks import Attempt, Verdict

_GATHERED = 64  # completions per message between hosts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """A model that completes prompts under named policies.

    `parts` is the model as `nnx.split` returns it. `sample` is the policy that the name `sample`
    stands for. `temperature` applies to the distribution of tokens.
    """

    parts: tuple[Any, ...]
    layers: int
    tokenizer: Tokenizer
    sample: Sample = Sample()
    size: EngineSize
    temperature: float
    max_new_tokens: int
    seed: int

    def policy(self, name: str) -> Policy:
        return policy_of(name, self.sample, "confidence")

    def under(self, name: str) -> Decoder:
        """Returns this decoder, with `ConfidenceHeads` if the policy called `name` needs them."""
        return self._confident if is_confidence(name) else self

    @functools.cached_property
    def _confident(self) -> Decoder:
        return dataclasses.replace(self, parts=confident(self.parts))

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        policy: Policy,
        *,
        max_new_tokens: int | None = None,
        forced: Sequence[int] | None = None,
        judge: Callable[[Sequence[int], Sequence[Attempt]], Sequence[Verdict]] | None = None,
        what: str,
    ) -> tuple[list[Attempt], float]:
        """Returns an attempt at each prompt, and the tokens per second of all hosts together.

        The time for compilation does not count. Every host passes all prompts and receives all
        attempts, but decodes and judges only its own share. `judge(numbers, attempts)` returns a
        verdict on each attempt, where `numbers` are indices of `prompts`; without `judge`, verdicts
        are None. `what` describes the work in error messages. See `jexit.rollout.rollout` for the
        other arguments.
        """
        here = host_rows(len(prompts))
        made = rollout(
            self.parts,
            [prompts[index] for index in here.index_B],
            policy=policy,
            max_new_tokens=max_new_tokens or self.max_new_tokens,
            temperature=self.temperature,
            eos_ids=self.tokenizer.eos_ids,
            pad_id=self.tokenizer.pad_id,
            key=self.seed,
            total=len(prompts),
            forced=None if forced is None else [forced[index] for index in here.index_B],
            size=self.size,
        )
        text_of = self.tokenizer.completion_text
        own = np.flatnonzero(made.host_rows.first_B)
        numbers, attempts = made.host_rows.index_B[own].tolist(), attempts_of(made, own, text_of)
        verdicts = judge(numbers, attempts) if judge else [None] * len(own)
        mine = {
            number: (attempt.ids, attempt.depths, attempt.truncated, verdict and vars(verdict))
            for number, attempt, verdict in zip(numbers, attempts, verdicts, strict=True)
        }
        rows: dict[int, Attempt] = {}
        for start in range(0, len(prompts), _GATHERED):
            part = [
                [number, *mine[number]]
                for number in range(start, min(start + _GATHERED, len(prompts)))
                if number in mine
            ]
            for number, ids, depths, cut, verdict in itertools.chain(*gather(what, part)):
                rows[number] = Attempt(
                    ids=ids,
                    text=text_of(ids),
                    depths=depths,
                    truncated=cut,
                    verdict=Verdict(**verdict) if verdict else None,
                )
        attempts = [rows[number] for number in range(len(prompts))]
        tokens = sum(len(ids) for ids, *_ in mine.values())
        return attempts, sum(gather(what, tokens / made.seconds))


def attempts_of(
    made: Rollouts, rows: Iterable[int], text_of: Callable[[Sequence[int]], str]
) -> list[Attempt]:
    attempts = []
    for row in rows:
        ids = made.completion(row)
        attempts.append(
            Attempt(
                ids=ids,
                text=text_of(ids),
                depths=made.depths_BT[row, : len(ids)].tolist(),
                truncated=bool(made.truncated_B[row]),
            )
        )
    return attempts
