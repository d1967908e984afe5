"""A model that completes prompts under named policies, on every host the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jexit.config import EngineSize, parse_policy
from jexit.data.tokenizer import Tokenizer
from jexit.dist import gather, host_rows
from jexit.errors import UserError
from jexit.model.policies import Fixed, Full, Policy, Sample, Threshold
from jexit.rollout import rollout

_GATHERED = 64  # completions of a message between hosts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """A completion of one prompt; a token's depth is of the pass that produced it."""

    ids: list[int]
    text: str
    depths: list[int]
    truncated: bool
    verdict: str = ""

    @property
    def correct(self) -> bool:
        return self.verdict in ("strict", "lenient")

    @property
    def layers_run(self) -> int:
        return sum(self.depths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """`parts` is the split model, `law` what the policy `sample` means."""

    parts: tuple[Any, ...]
    layers: int
    tokenizer: Tokenizer
    law: Sample = Sample()
    size: EngineSize
    temperature: float
    max_new_tokens: int
    seed: int

    def policy(self, name: str) -> Policy:
        return make_policy(name, self.layers, self.law)

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        policy: Policy,
        *,
        max_new_tokens: int | None = None,
        forced: Sequence[int] | None = None,
        judge: Callable[[int, str, bool], str] | None = None,
        what: str,
    ) -> tuple[list[Attempt], float]:
        """(an attempt at each prompt, tokens a second without compilation).

        Every host gives all prompts and gets all attempts; each decodes and judges its own. `judge`
        gives the verdict on the completion of a prompt, by its number, its text and whether it was
        cut off. `what` says in messages what is being decoded; the rest as
        `jexit.rollout.rollout` has it.
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
        mine = {}
        for row in np.flatnonzero(made.host_rows.first_B):
            number, ids = int(made.host_rows.index_B[row]), made.completion(row)
            depths = made.depths_BT[row, : made.lengths_B[row]].tolist()
            cut = bool(made.truncated_B[row])
            mine[number] = (ids, depths, cut, judge(number, text_of(ids), cut) if judge else "")
        rows: dict[int, tuple[list[int], list[int], bool, str]] = {}
        for start in range(0, len(prompts), _GATHERED):
            numbers = range(start, min(start + _GATHERED, len(prompts)))
            part = [[number, *mine[number]] for number in numbers if number in mine]
            for host in gather(what, part):
                rows |= {number: tuple(row) for number, *row in host}
        attempts = [
            Attempt(ids=ids, text=text_of(ids), depths=depths, truncated=cut, verdict=verdict)
            for ids, depths, cut, verdict in (rows[number] for number in range(len(prompts)))
        ]
        tokens = sum(len(ids) for ids, *_ in mine.values())
        return attempts, sum(gather(what, tokens / made.seconds))


def make_policy(text: str, layers: int, law: Sample = Sample()) -> Policy:
    """The policy that a config names, of a model with so many layers.

    `law` is what `sample` means: the temperature of the hazards and the floor under them.
    """
    kind, argument = parse_policy(text)
    if kind == "fixed":
        if argument > layers:
            raise UserError(
                f"policy {text!r} asks for {argument} layers of a model that has {layers}; use "
                f"fixed:N with N from 1 to {layers}"
            )
        return Fixed(argument)
    if kind == "threshold":
        return Threshold(argument)
    return law if kind == "sample" else Full()
