"""Decodes prompts under named policies, and returns the same attempts on every host."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jexit.config import EngineSize, parse_policy
from jexit.data.tokenizer import Tokenizer
from jexit.dist import gather, host_rows
from jexit.errors import UserError
from jexit.evaluation.confidence import confident, is_confidence
from jexit.model.policies import Fixed, Full, Policy, Sample, Threshold
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
        return make_policy(name, self.layers, self.sample, "confidence")

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
        """Returns an attempt at each prompt, and all hosts' tokens per second without compilation.

        Every host passes all prompts and receives all attempts, but decodes and judges only its own
        share. `judge(numbers, attempts)` returns a verdict on each attempt, where `numbers` are
        indices of `prompts`; without `judge`, verdicts are None. `what` describes the work in error
        messages. See `jexit.rollout.rollout` for the other arguments.
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


def make_policy(text: str, layers: int, sample: Sample = Sample(), *kinds: str) -> Policy:
    """Returns the policy with a name such as `full`, `sample`, `threshold:0.5` or `fixed:6`.

    `sample` is the policy to return for the name `sample`. With `confidence` among `kinds`,
    `confidence:X` is also a name, of `Threshold(X)` for a model whose exit heads are
    `ConfidenceHeads`. Raises UserError if the name is unknown, or if N in `fixed:N` is more than
    `layers`, the number of the model's layers.
    """
    kind, argument = parse_policy(text, *kinds)
    if kind == "fixed":
        if argument > layers:
            raise UserError(
                f"policy {text!r} requests {argument} layers, but the model has {layers}; use "
                f"fixed:N with N from 1 to {layers}"
            )
        return Fixed(argument)
    if kind in ("threshold", "confidence"):  # of the exit heads, or of the exits' own predictions
        return Threshold(argument)
    return sample if kind == "sample" else Full()
