"""Completions that go on from forced prefixes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from jexit.data.loader import encode_problems
from jexit.errors import UserError
from jexit.evaluation.decoder import Decoder
from jexit.tasks import Problem

ANSWER_TOKENS = 16  # of an answer that follows its cue
FILLERS = (" .", ".", " -", "-", " ~", "~")  # texts without content; the first that stays apart


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """What a completer wrote, how deep the passes were that wrote it, and if it was cut off."""

    text: str
    depths: Sequence[int]
    cut: bool = False


class Completer(Protocol):
    """Goes on from prefixes of completions, as a model or as a script whose reasoning is known.

    A prefix counts as the completion's own: its passes leave as the policy says. `opening` is what
    every completion's text has before the model writes, such as `<think>`.
    """

    layers: int
    opening: str

    def complete(
        self, problems: Sequence[Problem], prefixes: Sequence[str], *, answer_only: bool
    ) -> list[Reply | None]:
        """What follows each problem's prefix; `answer_only` when that is a few tokens.

        Each prefix begins with `opening`. None where the model has no room to write.
        """

    def filler(self, text: str) -> str:
        """Text without content that has as many tokens as `text`."""


@dataclasses.dataclass(frozen=True)
class ModelCompleter:
    """A model under a named policy as a `Completer`.

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
        self, problems: Sequence[Problem], prefixes: Sequence[str], *, answer_only: bool
    ) -> list[Reply | None]:
        """What the model writes after each prefix, as far as its positions allow.

        A prefix that leaves too few positions for an answer gets None. The others are decoded
        together, except those with fewer positions than a reply may take: they are decoded in a
        second batch, limited to what the prefix with the least room allows.
        """
        decoder, tokenizer = self.decoder, self.decoder.tokenizer
        least = min(ANSWER_TOKENS, decoder.max_new_tokens)
        wanted = least if answer_only else decoder.max_new_tokens
        asked = encode_problems(tokenizer, problems)
        forced = tokenizer.encode_batch([text.removeprefix(self.opening) for text in prefixes])
        room = [self.positions - len(a) - len(f) for a, f in zip(asked, forced, strict=True)]
        replies: list[Reply | None] = [None] * len(asked)
        enough = [row for row, left in enumerate(room) if left >= wanted]
        scarce = [row for row, left in enumerate(room) if least <= left < wanted]
        for rows in filter(None, (enough, scarce)):
            new = min(wanted, *(room[row] for row in rows))
            attempts, _ = decoder.decode(
                [asked[row] + forced[row] for row in rows],
                decoder.policy(self.policy),
                max_new_tokens=new,
                forced=[len(forced[row]) for row in rows],
                what=f"measurements under {self.policy}",
            )
            for row, made in zip(rows, attempts, strict=True):
                replies[row] = Reply(
                    text=tokenizer.decode(made.ids), depths=made.depths, cut=made.truncated
                )
        return replies

    def filler(self, text: str) -> str:
        """Punctuation of as many tokens as `text` has."""
        encode = self.decoder.tokenizer.encode
        apart = [mark for mark in FILLERS if len(encode(mark * 8)) == 8]
        if not apart:
            raise UserError(
                f"the tokenizer merges repetitions of each of {FILLERS}, so no filler of a given "
                "number of tokens can be made; leave filler out of config.eval.measures"
            )
        return apart[0] * len(encode(text))
