"""Continues completions whose beginning is given, and scores answers after such a forced prefix."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from jexit.data.loader import encode_problems
from jexit.errors import UserError
from jexit.evaluation.decoder import Decoder
from jexit.evaluation.loglikelihood import token_scores
from jexit.evaluation.replay import Recorded
from jexit.tasks import Attempt, Problem

ANSWER_TOKENS = 16  # for an answer that follows its cue
# Texts without content. The first one whose repetitions the tokenizer does not merge is used.
FILLERS = (" .", ".", " -", "-", " ~", "~")


@dataclasses.dataclass(frozen=True)
class ModelCompleter:
    """Continues completions from forced prefixes under the policy called `policy`.

    A prefix counts as part of the completion, so the policy decides after how many layers its
    tokens leave. `positions` is the maximum length of a prompt and its completion together. Tests
    may use a scripted model instead of this class.
    """

    decoder: Decoder
    policy: str
    positions: int

    @property
    def layers(self) -> int:
        return self.decoder.layers

    @property
    def opening(self) -> str:
        """The text with which every completion begins, or "" if there is none.

        It is `<think>` and a line break if the chat template ends prompts with `<think>`.
        """
        return self.decoder.tokenizer.completion_text([])

    def complete(
        self, problems: Sequence[Problem], prefixes: Sequence[str], *, answer_only: bool
    ) -> list[Attempt | None]:
        """Returns the model's continuation of each prefix, which follows the problem's prompt.

        An attempt contains only the new tokens, not the prefix, and has no verdict. With
        `answer_only`, at most `ANSWER_TOKENS` tokens are decoded. An entry is None if prompt
        and prefix leave room for fewer than `ANSWER_TOKENS` tokens (or than `max_new_tokens`, if
        that is less). Prefixes with more room, but not enough for a full reply, are decoded
        together in a second batch. The smallest room in this batch is the limit for its replies.
        """
        decoder, tokenizer = self.decoder, self.decoder.tokenizer
        least = min(ANSWER_TOKENS, decoder.max_new_tokens)
        wanted = least if answer_only else decoder.max_new_tokens
        asked = encode_problems(tokenizer, problems)
        forced = tokenizer.encode_batch([text.removeprefix(self.opening) for text in prefixes])
        room = [self.positions - len(a) - len(f) for a, f in zip(asked, forced, strict=True)]
        replies: list[Attempt | None] = [None] * len(asked)
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
                replies[row] = dataclasses.replace(made, text=tokenizer.decode(made.ids))
        return replies

    def log_likelihoods(
        self, problems: Sequence[Problem], prefixes: Sequence[str], answers: Sequence[str]
    ) -> list[float | None]:
        """Returns the log-likelihood log π(answer | prompt, prefix) of each answer in nats.

        An entry is None if prompt, prefix and answer together exceed `positions` tokens. The policy
        `sample` draws depths for the tokens of the prefix too.
        """
        decoder, tokenizer = self.decoder, self.decoder.tokenizer
        asked = encode_problems(tokenizer, problems)
        forced = tokenizer.encode_batch([text.removeprefix(self.opening) for text in prefixes])
        given = tokenizer.encode_batch(list(answers))
        lengths = [len(a) + len(f) + len(g) for a, f, g in zip(asked, forced, given, strict=True)]
        rows = [row for row, length in enumerate(lengths) if length <= self.positions]
        found: list[float | None] = [None] * len(lengths)
        if not rows:
            return found
        completions = [forced[row] + given[row] for row in rows]
        recorded = Recorded(
            [asked[row] for row in rows],
            completions,
            [[0] * len(completion) for completion in completions],  # the policy decides
            tokenizer.pad_id,
        )
        (graphdef, *states), policy = decoder.parts, decoder.policy(self.policy)
        key = jax.random.key(decoder.seed)
        logprob_BC, *_ = recorded.through(
            lambda batch, _: token_scores(graphdef, tuple(states), batch, policy, key)
        )
        for row, logprob_C, completion in zip(rows, logprob_BC, completions, strict=True):
            found[row] = float(logprob_C[len(forced[row]) : len(completion)].sum())
        return found

    def filler(self, text: str) -> str:
        """Returns a repeated punctuation mark with as many tokens as `text`.

        Raises UserError if the tokenizer merges repetitions of every mark in `FILLERS`.
        """
        encode = self.decoder.tokenizer.encode
        apart = [mark for mark in FILLERS if len(encode(mark * 8)) == 8]
        if not apart:
            raise UserError(
                f"the tokenizer merges repetitions of each of {FILLERS}, so jexit cannot make a "
                "filler with a given number of tokens; remove 'filler' and 'substantivity' from "
                "config.eval.measures"
            )
        return apart[0] * len(encode(text))
