"""A model that completes prompts under named policies, on every host the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jexit.data.loader import encode_problems
from jexit.data.tokenizer import Tokenizer
from jexit.dist import gather, host_rows
from jexit.eval.continuations import Reply
from jexit.loops.setup import make_policy
from jexit.model.policies import Policy, Sample
from jexit.rollout import EngineSize, rollout
from jexit.tasks import Problem

ANSWER_TOKENS = 16  # of an answer that follows its cue
FILLERS = (" .", ".", " -", "-", " ~", "~")  # texts without content; the first that stays apart
_GATHERED = 64  # completions of a message between hosts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoded:
    """Completions of all prompts, in their order; a token's depth is of the pass that made it."""

    ids: list[list[int]]
    depths: list[list[int]]
    truncated: list[bool]
    verdicts: list[str | None]
    tokens_per_second: float  # without compilation


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

    def policy(self, name: str, rows: int, columns: int) -> Policy:
        return make_policy(name, rows, columns, self.layers, self.law)

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        policy: Policy,
        *,
        max_new_tokens: int | None = None,
        written: Sequence[int] | None = None,
        judge: Callable[[int, list[int], bool], str] | None = None,
        what: str,
    ) -> Decoded:
        """Every host gives all prompts and gets all completions; each decodes and judges its own.

        `judge` gives the verdict on the completion of a prompt, by its number, its tokens and
        whether it was cut off. `what` says in
        messages what is being decoded; the rest as `jexit.rollout.rollout` has it.
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
            written=None if written is None else [written[index] for index in here.index_B],
            size=self.size,
        )
        mine = {}
        for row in np.flatnonzero(made.host_rows.first_B):
            depths = made.depths_BT[row, : made.lengths_B[row]].tolist()
            number = int(made.host_rows.index_B[row])
            ids = made.completion(row)
            cut = bool(made.truncated_B[row])
            verdict = None if judge is None else judge(number, ids, cut)
            mine[number] = (ids, depths, cut, verdict)
        rows: dict[int, tuple[list[int], list[int], bool, str | None]] = {}
        for start in range(0, len(prompts), _GATHERED):
            numbers = range(start, min(start + _GATHERED, len(prompts)))
            part = [[number, *mine[number]] for number in numbers if number in mine]
            for host in gather(what, part):
                rows |= {number: tuple(row) for number, *row in host}
        ordered = (rows[number] for number in range(len(prompts)))
        ids, depths, truncated, verdicts = map(list, zip(*ordered, strict=True))
        tokens = sum(len(completion) for completion, *_ in mine.values())
        speeds = gather(what, tokens / made.seconds)
        return Decoded(
            ids=ids, depths=depths, truncated=truncated, verdicts=verdicts,
            tokens_per_second=sum(speeds),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelCompleter:
    """Goes on from the beginnings of completions, under a policy (`eval.continuations.Completer`).

    `positions` is how many the model has for a prompt and its completion.
    """

    decoder: Decoder
    policy: str
    positions: int

    @property
    def layers(self) -> int:
        return self.decoder.layers

    @property
    def opening(self) -> str:
        """What prompts of this tokenizer open already."""
        return self.decoder.tokenizer.completion_text([])

    def complete(
        self, problems: Sequence[Problem], begun: Sequence[str], *, answer_only: bool
    ) -> list[Reply | None]:
        """What follows, as long as the positions that are left allow.

        What leaves less than an answer's room gets None. The others share a decode, but for those
        that have less room than the rest need: a decode of their own cuts them off where the
        fullest of them ends.
        """
        decoder = self.decoder
        tokenizer = decoder.tokenizer
        least = min(ANSWER_TOKENS, decoder.max_new_tokens)
        wanted = least if answer_only else decoder.max_new_tokens
        asked = encode_problems(tokenizer, problems)
        written = tokenizer.encode_batch([text.removeprefix(self.opening) for text in begun])
        room = [self.positions - len(a) - len(w) for a, w in zip(asked, written, strict=True)]
        replies: list[Reply | None] = [None] * len(asked)
        enough = [row for row, left in enumerate(room) if left >= wanted]
        scarce = [row for row, left in enumerate(room) if least <= left < wanted]
        for rows in filter(None, (enough, scarce)):
            new = min(wanted, *(room[row] for row in rows))
            columns = max(len(written[row]) for row in rows) + new
            decoded = decoder.decode(
                [asked[row] + written[row] for row in rows],
                decoder.policy(self.policy, len(rows), columns),
                max_new_tokens=new,
                written=[len(written[row]) for row in rows],
                what=f"measurements under {self.policy}",
            )
            made = zip(rows, decoded.ids, decoded.depths, decoded.truncated, strict=True)
            for row, ids, depths, cut in made:
                replies[row] = Reply(text=tokenizer.decode(ids), depths=depths, cut=cut)
        return replies

    def filler(self, text: str) -> str:
        """Punctuation of as many tokens as `text` has."""
        encode = self.decoder.tokenizer.encode
        apart = [mark for mark in FILLERS if len(encode(mark * 8)) == 8]
        if not apart:
            raise ValueError(
                f"the tokenizer joins repetitions of each of {FILLERS}, so that the length of "
                "filler is not known; leave filler out of config.eval.measures"
            )
        return apart[0] * len(encode(text))
