"""A model provider for Inspect that decodes a jexit model in the process of the evaluation."""

from __future__ import annotations

from typing import Any

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelAPI,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from jexit.serve.pool import open_pool
from jexit.serve.protocol import Refused, TokenLogprob, gathered, usage

CONNECTIONS = 64  # as many completions as the pool decodes at a time
SETTINGS = {  # of Inspect's config → fields of a request
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "seed": "seed",
    "stop_seqs": "stop",
    "num_choices": "n",
    "logprobs": "logprobs",
    "top_logprobs": "top_logprobs",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "logit_bias": "logit_bias",
    "best_of": "best_of",
    "response_schema": "response_format",
}


class JexitAPI(ModelAPI):
    """Inspect's interface to a model directory; `model_args` are arguments of `open_pool`."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        self._opened = open_pool(model_name, **model_args)

    def max_connections(self) -> int:
        return CONNECTIONS

    def close(self) -> None:
        self._opened.pool.close()

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """Completes a conversation.

        The reasoning of earlier assistant messages is left out of the prompt. Raises Refused for
        tools, for other content than text and for unsupported settings.
        """
        if tools:
            raise Refused(
                400, "the request contains tools, but jexit does not support tools; leave them out"
            )
        values: dict[str, Any] = {
            "messages": [
                {"role": message.role, "content": _text(message, index)}
                for index, message in enumerate(input)
            ]
        }
        for name, field in SETTINGS.items():
            if (value := getattr(config, name)) is not None:
                values[field] = value
        asked = self._opened.asked(values | (config.extra_body or {}), chat=True)
        whole = await gathered(self._opened.answer(asked))
        used = usage(asked, [choice for choice, _ in whole])
        layers, exits = self._opened.model.arch.layers, list(self._opened.model.exit_layers)
        depths = [fields["depths"] for _, fields in whole]
        return ModelOutput(
            model=self.model_name,
            choices=[
                ChatCompletionChoice(
                    message=ChatMessageAssistant(content=fields["text"], source="generate"),
                    stop_reason="stop" if choice.finish_reason == "stop" else "max_tokens",
                    logprobs=_logprobs(fields.get("logprobs")),
                )
                for choice, fields in whole
            ],
            usage=ModelUsage(
                input_tokens=used["prompt_tokens"],
                output_tokens=used["completion_tokens"],
                total_tokens=used["total_tokens"],
            ),
            metadata={
                "depths": depths[0],  # of the first choice, one number per token
                "depths_of_choices": depths,
                "layers_run": used["layers_run"],
                "layers": layers,
                "exit_layers": exits,
                "opening": self._opened.tokenizer.completion_text([]),  # of what a task judges
            },
        )


def _text(message: ChatMessage, index: int) -> str:
    """Returns the text of message `index`; raises Refused if a part of it is not text."""
    for number, part in enumerate(message.content_list):
        reasoning = part.type == "reasoning" and message.role == "assistant"
        if part.type != "text" and not reasoning:
            raise Refused(
                400,
                f"messages[{index}].content[{number}].type is {part.type!r}, but jexit reads only "
                "text; leave the part out, or write it as text",
                "messages",
            )
    return message.text


def _logprobs(found: list[TokenLogprob] | None) -> Logprobs | None:
    if found is None:
        return None
    return Logprobs(
        content=[
            Logprob(token=each.text, logprob=each.logprob, bytes=[*each.data]) for each in found
        ]
    )
