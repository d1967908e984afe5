"""Makes a model under a halting policy available to lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from jexit.errors import UserError, missing_package

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(missing_package(error.name, "eval"), name=error.name) from error

from jexit.data.tokenizer import Tokenizer
from jexit.evaluation.loglikelihood import Scorer
from jexit.io.model_dir import load
from jexit.model.policies import Sample, check_policy, policy_of
from jexit.model.transformer import Transformer
from jexit.rollout import generate
from jexit.tasks.answers import THINK_START

BATCH_SIZE = 16
_SAMPLING = ("top_p", "top_k", "min_p")  # settings of a request; names as in transformers
# Further settings that a request may contain, each with the only value that is allowed: the one
# that has no effect.
_NEUTRAL: Mapping[str, Any] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "n", "best_of"), 1),
    **dict.fromkeys(("repetition_penalty", "length_penalty", "typical_p", "guidance_scale"), 1.0),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "diversity_penalty"), 0.0),
    **dict.fromkeys(("no_repeat_ngram_size", "min_length", "min_new_tokens", "min_tokens"), 0),
    "early_stopping": False,
    "use_cache": True,
}


@register_model("jexit")
class JexitLM(TemplateLM):
    """A model for lm-evaluation-harness that runs under one halting policy.

    `pretrained` is a model directory, or a model object that is passed with its `tokenizer`.
    `policy` applies to the passes that score or generate tokens; prompts and contexts run every
    layer. The policy `sample` draws depths with `seed` from the hazards. By default,
    `hazard_temperature` and `min_hazard`, the lower bound of hazards, have the values under which
    the model's exits were trained, or 1 and 0 if these are not known.

    A context that is too long for `max_length` positions (default: the model's) is cut on the left,
    so that the continuation, or `max_gen_toks` new tokens, fit. A continuation that is too long by
    itself is an error. A request without `do_sample` or a temperature is decoded greedily.

    `thinking` is on, off or auto, for chat templates with a thinking switch. `think_end_token`,
    such as `</think>`, is the text that ends the model's thinking. The answer is then the text
    after the last `think_end_token`, or empty if the thinking does not end, and stop strings apply
    only to the answer.
    """

    def __init__(
        self,
        pretrained: str | Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        policy: str = "full",
        seed: int = 0,
        batch_size: int | str = BATCH_SIZE,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        dtype: str = "auto",
        thinking: str = "auto",
        think_end_token: str | None = None,
        hazard_temperature: float | None = None,
        min_hazard: float | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if device is not None:
            raise UserError(
                f"device is {device!r}, but JAX chooses its devices itself; omit device, or choose "
                "the kind of device with the environment variable JAX_PLATFORMS"
            )
        if isinstance(pretrained, Transformer):
            if tokenizer is None:
                raise UserError(
                    "a model object was given without a tokenizer, but texts cannot be encoded "
                    "without one; pass the model's tokenizer as tokenizer="
                )
            self._model, self.texts = pretrained, tokenizer
        else:
            self._model, self.texts = load(pretrained, dtype=dtype)
        self.texts.thinking = thinking
        self.tokenizer = self.texts.backend  # where lm-eval looks for the chat template
        self.policy, self.seed = policy, int(seed)
        given = {"temperature": hazard_temperature, "min_hazard": min_hazard}
        given = {name: float(value) for name, value in given.items() if value is not None}
        self._policy = policy_of(policy, Sample.trained(self._model.exit_head).replace(**given))
        check_policy(self._policy, (*self._model.exit_layers, self._model.arch.layers))
        self.max_gen_toks, self.think_end_token = int(max_gen_toks), think_end_token
        self.batch_size = BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size)
        if max_batch_size is not None:
            self.batch_size = min(self.batch_size, int(max_batch_size))
        self._scorer = Scorer(
            self._model,
            policy=self._policy,
            pad_id=self.texts.pad_id,
            seed=self.seed,
            batch_size=self.batch_size,
            max_length=None if max_length is None else int(max_length),
        )
        self.max_length = self._scorer.max_length
        self.depth_total, self.tokens = 0, 0

    def get_model_info(self) -> dict[str, Any]:
        """Returns the settings, mean depth and token count that lm-eval adds to its results.

        The mean depth is None if no token has been scored or generated yet.
        """
        layers = self._model.arch.layers
        depth = self.depth_total / self.tokens if self.tokens else None
        return {
            "policy": self.policy,
            "seed": self.seed,
            "thinking": self.texts.thinking,
            "layers": layers,
            "depth_mean": depth,
            "depth_fraction": None if depth is None else depth / layers,
            "tokens": self.tokens,
        }

    # The tokenizer interface of lm-eval

    @property
    def eot_token_id(self) -> int:
        return self.texts.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token id before a text without context: BOS, or else the end-of-sequence token."""
        begin = self.texts.backend.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """A name for the tokenizer and its thinking switch, under which lm-eval caches prompts."""
        where = str(self.texts.directory).replace("/", "__")
        return f"{where}__thinking_{self.texts.thinking}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encodes a text; `add_special_tokens=False` omits the BOS token."""
        if add_special_tokens is False:
            return self.texts.encode(string)
        return self.texts.encode_texts([string])[0]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Formats messages with the chat template, by default up to where the next answer begins.

        Raises UserError if the tokenizer does not have a chat template.
        """
        if not self.texts.has_chat_template:
            raise UserError(
                f"the tokenizer in {self.texts.directory} has no chat template; omit "
                "--apply_chat_template"
            )
        return self.texts.render(chat_history, answer=add_generation_prompt)

    # Log-likelihoods

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        answers: list[tuple[float, bool] | None] = [None] * len(pairs)
        bar = tqdm(total=len(pairs), desc="log-likelihoods", disable=disable_tqdm)
        for found in self._scorer.batches(pairs):
            for index, score in found.items():
                self.depth_total += sum(score.depths)
                self.tokens += len(score.depths)
                answers[index] = answer = (score.total, score.greedy)
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
            bar.update(len(found))
        bar.close()
        return [answer for answer in answers if answer is not None]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-likelihood of each request's whole text in nats, computed in windows.

        A token is scored once, as part of the continuation of one window, where the policy decides
        its depth. Earlier tokens that a window repeats as context run every layer.
        """
        windows, owners = [], []
        for owner, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (total, _) in zip(owners, scored, strict=True):
            totals[owner] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # Generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns each request's continuation, decoding requests with equal settings together."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            key = json.dumps(request.args[1], sort_keys=True, default=str)
            groups.setdefault(key, []).append(index)
        texts = [""] * len(requests)
        bar = tqdm(total=len(requests), desc="generation", disable=disable_tqdm)
        for chosen in groups.values():
            contexts = [requests[index].args[0] for index in chosen]
            settings = requests[chosen[0]].args[1]
            for index, text in zip(chosen, self._generated(contexts, settings), strict=True):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
            bar.update(len(chosen))
        bar.close()
        return texts

    def _generated(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), self.max_gen_toks))
        new, stop = wanted.pop("max_gen_toks"), [text for text in wanted.pop("until") if text]
        sampled, temperature = wanted.pop("do_sample"), wanted.pop("temperature", 1.0)
        options = {name: wanted.pop(name, None) for name in _SAMPLING}
        options = {name: value for name, value in options.items() if sampled and value is not None}
        _refuse(wanted)
        room = self.max_length - new
        if room < 1:
            raise UserError(
                f"max_gen_toks is {new}, which leaves no room for a context in the model's "
                f"{self.max_length} positions; lower it to at most {self.max_length - 1}"
            )
        thinks = self.think_end_token
        made = generate(
            self._model,
            _Truncating(self.texts, room),
            contexts,
            policy=self._policy,
            max_new_tokens=new,
            temperature=float(temperature) if sampled else 0.0,
            stop=() if thinks else stop,
            seed=self.seed,
            chat=False,
            **options,
        )
        self.depth_total += sum(map(sum, made.depths))
        self.tokens += sum(map(len, made.depths))
        if not thinks:
            return made.texts
        return [
            _before(
                _after_thought(text, thinks, opened=context.rstrip().endswith(THINK_START)), stop
            )
            for text, context in zip(made.texts, contexts, strict=True)
        ]


def _after_thought(text: str, end: str, *, opened: bool) -> str:
    """Returns the answer: the part of `text` after the last `end`, the text that ends thinking.

    If the thinking does not end, the answer is empty. If there is no thinking, the answer is the
    whole text. `opened` is true if the context has already opened a think block.
    """
    if end not in text:
        return "" if opened or text.lstrip().startswith(THINK_START) else text
    return text.rpartition(end)[2].lstrip()


class _Truncating:
    """A tokenizer that keeps at most the last `most` tokens of each text."""

    def __init__(self, tokenizer: Tokenizer, most: int) -> None:
        self._tokenizer, self._most = tokenizer, most

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids[-self._most :] for ids in self._tokenizer.encode_texts(texts)]


def _refuse(settings: Mapping[str, Any]) -> None:
    """Raises UserError for a generation setting that has an effect but is not supported.

    `settings` contains the settings that jexit does not read. A value of None has no effect, and
    neither do the values in `_NEUTRAL`.
    """
    for name, value in settings.items():
        if value is None or (name in _NEUTRAL and value == _NEUTRAL[name]):
            continue
        only = f" except as {_NEUTRAL[name]!r}" if name in _NEUTRAL else ""
        raise UserError(
            f"a task sets {name!r} to {value!r} for generation, which jexit does not support"
            f"{only}; override the task's generation_kwargs, leaving out {name!r}"
        )


def _before(text: str, stop: Sequence[str]) -> str:
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]
