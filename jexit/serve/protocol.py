"""The requests and responses of OpenAI's interface, with the fields that jexit adds.

jexit's fields of a request are `policy`, `hazards`, `top_k` and `min_p`. Each choice of a response
has `depths`, the number of layers run for each token, and `layers_run`, their sum; with `hazards`,
also the probability of leaving at each exit (null at exits that the token did not reach).
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import math
import re
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from jexit.data.tokenizer import Tokenizer
from jexit.model.policies import Policy, Sample, policy_of
from jexit.rollout import Grown, Request
from jexit.rollout.texts import GrowingText
from jexit.settings import is_unicode, shown
from jexit.tasks.base import conversation_fault
from jexit.untrusted import parse_json

CHOICES = 64  # most of a request
FIELD_COUNT = 64  # most of a request; it has far fewer that are known
Probability = Annotated[float, Field(ge=0, le=1)]
InputText = Annotated[str, Field(max_length=1 << 20)]
Stop = Annotated[str, Field(max_length=1024)]
# Without `fail_fast`, pydantic keeps a fault for each of a million wrong entries.
Some = Field(min_length=1, max_length=1024, fail_fast=True)


class Refused(Exception):
    """Raised for a request that is answered by an HTTP error with the code `status`.

    `param` names the field of the request that is wrong, or is None if the error has no field.
    """

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param

    @property
    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "")
        return {
            "error": {
                "message": str(self),
                "type": kind or "invalid_request_error",
                "param": self.param,
                "code": None,
            }
        }


class _Strict(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """Drops null fields, which stand for defaults; raises ValueError for too many fields."""
        if not isinstance(values, Mapping):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        if len(given) > FIELD_COUNT:
            raise ValueError(f"Object should have at most {FIELD_COUNT} fields, not {len(given)}")
        return given


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # changes nothing


class TextFormat(_Strict):
    type: Literal["text"] = "text"


class ContentPart(_Strict):
    """A part of a message's content; only text is supported."""

    type: Literal["text"]
    text: InputText


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: InputText | Annotated[list[ContentPart], Some]
    name: str | None = None

    @property
    def said(self) -> dict[str, str]:
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class Body(_Strict):
    """The fields that chat requests and text requests have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: Probability | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    policy: Annotated[str, Field(max_length=64)] | None = None
    hazards: bool | None = None
    # Fields of the interface that are served at one value only, or that change nothing.
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[Any, Any], Field(max_length=0)] | None = None
    user: str | None = None
    metadata: dict[Any, Any] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class ChatBody(Body):
    messages: Annotated[list[ChatMessage], Some]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    response_format: TextFormat | None = None


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Several = Field(max_length=CHOICES, fail_fast=True)


class TextBody(Body):
    prompt: InputText | Annotated[list[InputText], Several] | Ids | Annotated[list[Ids], Several]
    logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: Literal[False] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None


FIELDS = {
    name
    for model in (ChatBody, TextBody, ChatMessage, ContentPart, StreamOptions, TextFormat)
    for name in model.model_fields
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The served model's name and policies, and the maximum number of new tokens."""

    name: str
    policy: Policy  # of requests without one
    sample: Sample  # the policy that the name `sample` stands for
    new_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParsedRequest:
    """A validated request; `request` is its form for the decoder, with one prompt per choice."""

    chat: bool
    request: Request
    stop: tuple[str, ...]
    stream: bool
    usage: bool  # whether a stream ends with the usage
    logprobs: bool
    hazards: bool
    prompt_tokens: int


def values_of(data: bytes) -> dict[str, Any]:
    """Parses the body of a request; raises Refused if it is not a JSON object."""
    try:
        values = parse_json(data)
    except ValueError as error:
        raise Refused(400, f"the body is not valid JSON ({error}); send a JSON object") from None
    if not isinstance(values, dict):
        raise Refused(400, f"the body is {shown(values)}, but it must be a JSON object; send one")
    return values


def parse(
    values: Mapping[str, Any], *, chat: bool, tokenizer: Tokenizer, limits: Limits
) -> ParsedRequest:
    """Validates the fields `values` of a request; raises Refused or UserError if invalid."""
    # An empty list of tools changes nothing; any other is an unknown field.
    values = {name: value for name, value in values.items() if (name, value) != ("tools", [])}
    try:
        body = (ChatBody if chat else TextBody).model_validate(values)
    except ValidationError as error:
        raise _refused(error) from None
    check_model(body.model, limits)
    stop = body.stops
    for text in stop:
        rule = ""
        if not text:
            rule = "not be empty"
        elif not is_unicode(text):
            rule = "be valid Unicode"
        elif "\ufffd" in text:
            rule = "not contain U+FFFD (the replacement character)"
        if rule:
            said = f"stop contains {shown(text)}, but a stop text must {rule}; correct it"
            raise Refused(400, said, "stop")
    n = body.n or 1
    if isinstance(body, ChatBody):
        prompts, logprobs = [_conversation(body, tokenizer)], bool(body.logprobs)
        new = body.max_completion_tokens or body.max_tokens
    else:
        prompts, logprobs = _prompts(body, tokenizer), body.logprobs is not None
        new = body.max_tokens
        if body.best_of not in (None, n):
            said = f"best_of is {body.best_of}, but it must equal n={n}; leave it out"
            raise Refused(400, said, "best_of")
    if n * len(prompts) > CHOICES:
        raise Refused(
            400,
            f"the request asks for {n * len(prompts)} completions, but one request may ask for at "
            f"most {CHOICES}; split it into several requests, or lower n",
            "n",
        )
    policy = limits.policy
    if body.policy is not None:
        policy = policy_of(body.policy, limits.sample, "speculate")
    if body.hazards and policy.drafts:
        raise Refused(
            400,
            f"hazards is True, but the policy {policy.name} records no hazards; leave hazards "
            "out, or use another policy",
            "hazards",
        )
    request = Request(
        prompts=[prompt for prompt in prompts for _ in range(n)],
        policy=policy,
        max_new_tokens=limits.new_tokens if new is None else new,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        min_p=body.min_p or 0.0,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        key=(secrets.randbits(32) if body.seed is None else body.seed) % (1 << 32),
    )
    _ = request.sampling  # raises UserError
    return ParsedRequest(
        chat=chat,
        request=request,
        stop=tuple(stop),
        stream=bool(body.stream),
        usage=body.stream_options is not None and body.stream_options.include_usage,
        logprobs=logprobs,
        hazards=bool(body.hazards),
        prompt_tokens=sum(map(len, prompts)),
    )


def check_model(name: str | None, limits: Limits) -> None:
    """Raises Refused if `name` is not that of the served model; None always passes."""
    if name not in (None, limits.name):
        said = f"the model {shown(name)} is not served here; use {limits.name!r}"
        raise Refused(404, said, "model")


def _refused(error: ValidationError) -> Refused:
    """Converts pydantic's error to a `Refused` that describes one fault in a sentence."""
    faults = error.errors(include_url=False)
    found = next((fault for fault in faults if fault["type"] == "too_long"), faults[0])
    extra = found["type"] == "extra_forbidden"
    within = found["loc"][:-1] if extra else found["loc"]
    # Of a value that fits none of several types, pydantic names the type as a part of the place.
    place = [p for p in within if isinstance(p, int) or p in FIELDS]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)[1:]
    param = str(place[0]) if place else None
    if extra:
        of = f" of {name}" if name else ""
        said = f"{shown(found['loc'][-1])} is not a field{of} that this server knows; leave it out"
    elif found["type"] == "missing":
        said = f"{name} is missing, but a request must have it; add it"
    else:
        name = name or ("a field's name" if isinstance(found["input"], str) else "the request")
        message = found["msg"].removeprefix("Value error, ").replace(" after validation", "")
        rule = re.sub(r"^\w+ should", "it must", message)
        rule = rule[:1].lower() + rule[1:]
        said = f"{name} is {shown(found['input'])}, but {rule}; change it"
    return Refused(400, said, param)


def _conversation(body: ChatBody, tokenizer: Tokenizer) -> list[int]:
    messages = [message.said for message in body.messages]
    if fault := conversation_fault(messages):
        raise Refused(400, f"the list messages {fault}; correct the messages", "messages")
    return tokenizer.encode_prompt(messages)


def _prompts(body: TextBody, tokenizer: Tokenizer) -> list[list[int]]:
    prompt: Any = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not prompt or not all(prompt):
        rule = "contain an empty prompt" if len(prompt) > 1 else "be empty"
        raise Refused(
            400,
            f"prompt is {shown(body.prompt)}, but it must not {rule}; send text or token ids",
            "prompt",
        )
    for text in prompt:
        if isinstance(text, str) and not is_unicode(text):
            raise Refused(
                400,
                "prompt contains half of a surrogate pair, but it must be valid Unicode; remove "
                "that half",
                "prompt",
            )
    return [
        tokenizer.encode_texts([text])[0] if isinstance(text, str) else list(text)
        for text in prompt
    ]


class TokenLogprob(NamedTuple):
    """A token's text, bytes and log-probability in nats, and its offset in the completion.

    The offset counts characters. If the token is only part of a character, `text` is U+FFFD.
    """

    text: str
    data: bytes
    logprob: float
    offset: int


@dataclasses.dataclass
class Choice:
    """One growing completion of a request, with its text so far and its finish reason."""

    asked: ParsedRequest
    index: int
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        self.text = GrowingText(self.tokenizer.decode, self.asked.stop)
        self.layers_run, self.finish_reason, self.parts = 0, "", 0
        self._characters = 0  # of the tokens so far, with log-probabilities only
        self._character = codecs.getincrementaldecoder("utf-8")("replace")

    def grow(self, grown: Grown) -> dict[str, Any]:
        """Adds tokens; returns the response fields for them, such as new `text` and `depths`.

        Tokens after a stop string are dropped. Text that may belong to a stop string is held back.
        """
        self.parts += 1
        before = self.text.tokens
        stopped = self.text.grow(grown.tokens, grown.finished)
        kept = self.text.tokens - before
        ids = grown.tokens[:kept]
        self.layers_run += sum(grown.depths[:kept])
        if stopped:
            self.finish_reason = "stop"
        elif grown.finished:
            ended = ids[-1] in self.tokenizer.eos_ids
            self.finish_reason = "stop" if ended else "length"
        fields: dict[str, Any] = {"text": self.text.news(), "depths": grown.depths[:kept]}
        if self.asked.hazards:
            fields["hazards"] = [_hazards(z_E) for z_E in grown.hazard_logits[:kept]]
        if self.asked.logprobs:
            fields["logprobs"] = []
            strings = self.tokenizer.tokens(ids)
            for number, text, value in zip(ids, strings, grown.logprobs[:kept], strict=True):
                data = self.tokenizer.token_bytes(number)
                fields["logprobs"].append(TokenLogprob(text, data, value, self._characters))
                if number not in self.tokenizer.eos_ids:
                    self._characters += len(self._character.decode(data))
        return fields


def _hazards(z_E: Sequence[float]) -> list[float | None]:
    """Converts hazard logits (NaN at exits that were not reached) to hazards, with None for NaN."""
    return [None if math.isnan(z) else 0.5 * (1.0 + math.tanh(0.5 * z)) for z in z_E]


def choice_body(choice: Choice, fields: Mapping[str, Any], *, part: bool) -> dict[str, Any]:
    """Returns the JSON of one choice of a response or, with `part`, of a chunk of a stream.

    `fields` contains what `Choice.grow` returned.
    """
    body: dict[str, Any] = {
        "index": choice.index,
        "finish_reason": choice.finish_reason or None,
        "logprobs": None,
        "depths": fields["depths"],
        "layers_run": choice.layers_run,
    }
    if choice.asked.chat:
        said = {"content": fields["text"]}
        if not part or choice.parts == 1:
            said = {"role": "assistant"} | said
        body["delta" if part else "message"] = said
        if "logprobs" in fields:
            content = [
                {"token": each.text, "logprob": each.logprob, "bytes": [*each.data],
                 "top_logprobs": []}
                for each in fields["logprobs"]
            ]  # fmt: skip
            body["logprobs"] = {"content": content, "refusal": None}
    else:
        body["text"] = fields["text"]
        if "logprobs" in fields:
            found = fields["logprobs"]
            body["logprobs"] = {
                "tokens": [each.text for each in found],
                "token_logprobs": [each.logprob for each in found],
                "top_logprobs": None,
                "text_offset": [each.offset for each in found],
            }
    if "hazards" in fields:
        body["hazards"] = fields["hazards"]
    return body


def usage(asked: ParsedRequest, choices: Sequence[Choice]) -> dict[str, int]:
    made = sum(choice.text.tokens for choice in choices)
    return {
        "prompt_tokens": asked.prompt_tokens,
        "completion_tokens": made,
        "total_tokens": asked.prompt_tokens + made,
        "layers_run": sum(choice.layers_run for choice in choices),
    }


async def gathered(
    parts: AsyncGenerator[tuple[Choice, dict[str, Any]]],
) -> list[tuple[Choice, dict[str, Any]]]:
    """Collects a whole response: each choice with the joined fields of its tokens, in order."""
    choices: dict[int, tuple[Choice, dict[str, Any]]] = {}
    async with contextlib.aclosing(parts):
        async for choice, fields in parts:
            _, whole = choices.setdefault(choice.index, (choice, {}))
            for name, value in fields.items():
                whole[name] = whole[name] + value if name in whole else value
    return [choices[index] for index in sorted(choices)]
