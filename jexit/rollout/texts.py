"""Completes text prompts; the completions are returned whole or streamed in pieces."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jexit.config import EngineSize
from jexit.data.tokenizer import Messages
from jexit.errors import UserError
from jexit.model.policies import Full, Policy, Sample, policy_of, warn_if_untrained
from jexit.model.transformer import Transformer
from jexit.rollout.engine import Decoding
from jexit.rollout.pool import Records
from jexit.rollout.requests import Request
from jexit.rollout.residuals import checked_layers, residuals_of
from jexit.rollout.scheduling import AUTOMATIC
from jexit.rollout.speculation import Speculation
from jexit.settings import shown
from jexit.tasks.base import conversation_fault

STOP_EVERY = 16  # token-drawing ticks between two searches for stop strings
_INCOMPLETE = "\ufffd"  # the first bytes of a character are decoded to this


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """The completions of text prompts, as lists with one entry per prompt.

    The tokens include the end-of-sequence token if the completion drew one.
    """

    texts: list[str]
    tokens: list[list[int]]
    depths: list[list[int]]  # of the pass that produced each token; the first is all layers
    logprobs: list[list[float]]
    depth_logprobs: list[list[float]]
    hazard_logits: list[list[list[float]]] | None  # one entry per exit, NaN at exits not reached
    residuals: list[np.ndarray] | None  # [tokens, layers, D], of the pass that produced each token
    truncated: list[bool]
    seconds: float
    acceptance: float | None  # fraction of drafted tokens that were accepted, under `Speculate`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """What one step of streaming adds to one completion; lists have one entry per token.

    `text` may lag behind `tokens`: the bytes of an incomplete character, and characters that may
    begin a stop string, are held back.
    """

    index: int  # the prompt's index
    text: str
    tokens: list[int]
    depths: list[int]
    logprobs: list[float]
    finished: bool


def generate(
    model: Transformer,
    tokenizer: Any,
    prompts: Sequence[str | Messages],
    *,
    policy: Policy | str = Full(),
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    chat: bool = True,
    adapters: bool = True,
    hazards: bool = False,
    residuals: Sequence[int] = (),
    size: EngineSize = AUTOMATIC,
) -> Generation:
    """Completes text prompts under a halting policy, which decides at which layer each token exits.

    `policy` is a policy or its name, such as "threshold:0.5". Under "speculate:LAYER" an exit
    drafts tokens and all layers verify them, so the text is what the full model would generate.
    `tokenizer` is a `jexit.data.tokenizer.Tokenizer`. With `chat`, each prompt is put into the
    tokenizer's chat format: a string is the user's message, and a list of messages (dicts with
    `role` and `content`) is a conversation that ends with the user's message. Without `chat`, a
    prompt is plain text, and the tokenizer may put a BOS token before it. Temperature 0 means
    greedy decoding. A completion ends with an end-of-sequence token, or with the token that
    completes one of the `stop` strings; the returned text ends before the stop string. With
    `hazards`, the hazard logits at the exits are returned too. `adapters=False` omits LoRA.

    `residuals` are increasing layer indices: ℓ means the residual that enters layer ℓ (from 0), and
    the number of layers means the residual after the last layer. The residuals are computed by one
    more pass over each text, at the depths that decoding recorded. In the layers that a token
    skips, its residual stays as it was at the exit or follows the model's linear continuation.

    Raises UserError for an invalid argument and for a request that `jexit.rollout.rollout` rejects.
    """
    request, texts = _asked(
        model, tokenizer, prompts, chat=chat, policy=policy, max_new_tokens=max_new_tokens,
        seed=seed, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, stop=stop,
        adapters=adapters, hazards=hazards,
    )  # fmt: skip
    if request.policy.drafts:
        return _speculated(Speculation(model, request), texts, residuals)
    decoding = _decoding(model, request, size)
    model = decoding.engine.model
    layers = checked_layers(residuals, model.arch.layers)
    while not decoding.turn(STOP_EVERY if stop else None):
        if stop:
            _look(decoding, texts)
    _look(decoding, texts)
    made = decoding.rollouts()

    def rows(values_BT: Any) -> list[list]:
        return [
            row[:length].tolist() for row, length in zip(values_BT, made.lengths_B, strict=True)
        ]

    tokens, depths = rows(made.tokens_BT), rows(made.depths_BT)
    return Generation(
        texts=[text.whole for text in texts],
        tokens=tokens,
        depths=depths,
        logprobs=rows(made.logprobs_BT),
        depth_logprobs=rows(made.depth_logprobs_BT),
        hazard_logits=rows(made.hazard_logits_BTE) if hazards else None,
        residuals=(
            residuals_of(model, made.prompts, tokens, depths, layers, adapters=adapters)
            if layers
            else None
        ),
        truncated=made.truncated_B.tolist(),
        seconds=made.seconds,
        acceptance=None,
    )


def _speculated(
    speculation: Speculation, texts: list[GrowingText], residuals: Sequence[int]
) -> Generation:
    """Runs self-speculative decoding to the end; returns the completions, all at full depth."""
    model, request = speculation.model, speculation.request
    layers = checked_layers(residuals, model.arch.layers)
    began, count = time.perf_counter(), len(request.prompts)
    tokens: list[list[int]] = [[] for _ in range(count)]
    logprobs: list[list[float]] = [[] for _ in range(count)]
    for piece in _speculated_pieces(speculation, texts):
        tokens[piece.index] += piece.tokens
        logprobs[piece.index] += piece.logprobs
    seconds = time.perf_counter() - began
    depths = [[model.arch.layers] * len(row) for row in tokens]
    asked = request.prompts, tokens, depths, layers
    eos, most = set(request.eos_ids), request.max_new_tokens
    return Generation(
        texts=[text.whole for text in texts],
        tokens=tokens,
        depths=depths,
        logprobs=logprobs,
        depth_logprobs=[[0.0] * len(row) for row in tokens],
        hazard_logits=None,
        residuals=residuals_of(model, *asked, adapters=request.adapters) if layers else None,
        truncated=[
            len(row) == most and row[-1] not in eos and not text.stopped
            for row, text in zip(tokens, texts, strict=True)
        ],
        seconds=seconds,
        acceptance=speculation.accepted / max(speculation.drafted, 1),
    )


def _speculated_pieces(speculation: Speculation, texts: list[GrowingText]) -> Iterator[Piece]:
    while not speculation.ended:
        for grown in speculation.turn():
            text, known = texts[grown.ticket], texts[grown.ticket].tokens
            if text.grow(grown.tokens, grown.finished):
                speculation.end(grown.ticket)
            kept = text.tokens - known
            yield Piece(
                index=grown.ticket,
                text=text.news(),
                tokens=grown.tokens[:kept],
                depths=grown.depths[:kept],
                logprobs=grown.logprobs[:kept],
                finished=text.over,
            )


def stream(
    model: Transformer,
    tokenizer: Any,
    prompts: Sequence[str | Messages],
    *,
    every: int = 4,
    **settings: Any,
) -> Iterator[Piece]:
    """Streams the completions of `generate` in pieces, as they grow.

    `settings` are the keyword arguments of `generate`, except `residuals`. The joined pieces of a
    prompt are the completion that `generate` returns. `every` is the number of token-drawing ticks
    (engine steps) between updates: with 1, each token is yielded as soon as it is drawn; larger
    values cost less time. Raises UserError before the first piece.
    """
    if every < 1:
        raise UserError(
            f"every is {every}, but it must be at least 1; set every=1 to get each token as soon "
            "as it is drawn"
        )
    if settings.pop("residuals", ()):
        raise UserError("stream returns no residuals; leave residuals out, or use jexit.generate")
    size = settings.pop("size", AUTOMATIC)
    request, texts = _asked(model, tokenizer, prompts, **settings)
    if request.policy.drafts:
        return _speculated_pieces(Speculation(model, request), texts)
    return _pieces(_decoding(model, request, size), texts, every)


def _decoding(model: Transformer, request: Request, size: EngineSize) -> Decoding:
    decoding = Decoding(model, request, size)
    warn_if_untrained(request.policy, decoding.engine.model)
    return decoding


def _asked(
    model: Transformer,
    tokenizer: Any,
    prompts: Sequence[str | Messages],
    *,
    chat: bool = True,
    seed: int = 0,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    stop: Sequence[str] = (),
    policy: Policy | str = Full(),
    **settings: Any,
) -> tuple[Request, list[GrowingText]]:
    """Checks the arguments of `generate`; returns the request and a `GrowingText` per prompt."""
    if isinstance(prompts, str):
        raise UserError(
            "prompts is one string, but it must be a list of prompts; put the string in brackets"
        )
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            continue
        if not chat:
            raise UserError(
                f"prompt {index} is {shown(prompt)}, but with chat=False it must be a string; give "
                "one that is already formatted, or leave chat=False out"
            )
        if fault := conversation_fault(prompt):
            raise UserError(
                f"prompt {index} {fault}; give the text of the user's message, or a list of chat "
                "messages that ends with it"
            )
    encode = tokenizer.encode_prompts if chat else tokenizer.encode_texts
    if isinstance(policy, str):
        policy = policy_of(policy, Sample.trained(model.exit_head), "speculate")
    request = Request(
        prompts=encode(list(prompts)),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        policy=policy,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        key=seed,
        **settings,
    )
    if isinstance(stop, str) or not all(stop):
        raise UserError(
            f"stop is {stop!r}, but it must be a list of non-empty strings; give one such as "
            "['\\n\\n']"
        )
    return request, [GrowingText(tokenizer.decode, stop) for _ in request.prompts]


def _pieces(decoding: Decoding, texts: list[GrowingText], every: int) -> Iterator[Piece]:
    done, sent = False, [0] * len(texts)
    while not done:
        done = decoding.turn(every)
        records = _look(decoding, texts)
        for row, text in enumerate(texts):
            part = slice(sent[row], text.tokens)
            sent[row] = text.tokens
            if part.start == part.stop:
                continue
            yield Piece(
                index=row,
                text=text.news(),
                tokens=records.tokens_JT[row, part].tolist(),
                depths=records.depths_JT[row, part].tolist(),
                logprobs=records.logprobs_JT[row, part].tolist(),
                finished=text.over,
            )


def _look(decoding: Decoding, texts: list[GrowingText]) -> Records:
    """Updates `texts`, ends completions that contain a stop string, and returns the records.

    In the records, these completions end with the token that completes the stop string.
    """
    records, cut_B = decoding.so_far(), np.zeros(len(texts), np.int32)
    over_B = records.ended_J | (records.length_J >= records.tokens_JT.shape[1])
    for row, text in enumerate(texts):
        length, over = records.length_J[row], bool(over_B[row])
        if text.over or length == text.tokens:
            text.over |= over
        elif text.grow(records.tokens_JT[row, text.tokens : length].tolist(), over):
            cut_B[row] = text.tokens
    if cut_B.any():
        decoding.cut(cut_B)
        records = records.replace(length_J=np.where(cut_B > 0, cut_B, records.length_J))
    return records


class GrowingText:
    """The text of a growing completion, which ends before its first stop string.

    `decode` maps token IDs to text. `whole` is the text so far, `tokens` the number of its tokens,
    `over` whether it has ended, and `stopped` whether a stop string ended it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._sent = 0
        self.whole, self.over, self.stopped = "", False, False

    @property
    def tokens(self) -> int:
        return len(self._ids)

    def grow(self, ids: Sequence[int], over: bool) -> bool:
        """Appends tokens, the last ones if `over`; returns whether a stop string ended the text.

        Tokens after the one that completed the stop string are dropped.
        """
        known = len(self._ids)
        self._ids += ids
        text = self._decode(self._ids)
        self.stopped = self._first_stop(text) >= 0
        if self.stopped:
            # Find the token that completed it: the tokens known before contain no stop string.
            while self._first_stop(text := self._decode(self._ids[: known + 1])) < 0:
                known += 1
            del self._ids[known + 1 :]
            text = text[: self._first_stop(text)]
        self.whole, self.over = text, over or self.stopped
        return self.stopped

    def news(self) -> str:
        """Returns the text added since the last call, except text that later tokens may change."""
        end = len(self.whole) if self.over else self._settled()
        new = self.whole[self._sent : end]
        self._sent = max(self._sent, end)
        return new

    def _first_stop(self, text: str) -> int:
        return min((at for s in self._stop if (at := text.find(s)) >= 0), default=-1)

    def _settled(self) -> int:
        """Returns the number of leading characters of `whole` that later tokens cannot change.

        An incomplete character, and an end that may be the start of a stop string, do not count.
        """
        end = len(self.whole.rstrip(_INCOMPLETE))
        settled = end
        for stop in self._stop:
            for size in range(min(len(stop) - 1, end), 0, -1):
                if self.whole[:end].endswith(stop[:size]):
                    settled = min(settled, end - size)
                    break
        return settled
