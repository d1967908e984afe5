"""Rollouts, evaluation and `generate`: one engine over prefill and decode."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jexit.axes import PRNGKey
from jexit.dist import HostRows, fetch_rows, gather, host_rows, place_rows, waiting
from jexit.model.cache import cache_bucket, prompt_bucket
from jexit.model.policies import Full, Policy, Prescribed
from jexit.model.transformer import Transformer
from jexit.presets import Architecture
from jexit.rollout import decode
from jexit.rollout.sampling import Sampling

SplitModel: TypeAlias = tuple[Any, ...]  # (graphdef, *states) as `nnx.split` returns them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequences:
    """Prompts with their completions, right-padded, for training and teacher forcing.

    Column t describes the pass at input position t, which produces token t + 1.
    """

    tokens_BT: np.ndarray  # int32
    lengths_B: np.ndarray  # int32, prompt and completion
    depth_BT: np.ndarray  # int32: recorded at action positions, L elsewhere; for `Prescribed`
    target_mask_BT: np.ndarray  # bool: positions that produce a generated token
    action_BT: np.ndarray  # bool: positions whose pass may leave early
    logprobs_BT: np.ndarray  # float32: recorded log-probability of token t + 1
    depth_logprobs_BT: np.ndarray  # float32: recorded log-probability of the depth at t


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Completions of a batch: B = prompts · samples rows, those of one prompt adjacent.

    T is `max_new_tokens`; beyond a row's length there are `pad_id` and zeros. A token's depth is
    that of the pass that produced it, so column 0 of `depths_BT` is L. With several hosts these are
    the rows that lie here.
    """

    prompts: list[list[int]]
    prompt_B: np.ndarray  # int, the place of a row's prompt in `prompts`
    host_rows: HostRows  # of the whole batch, the rows that are here
    layers: int
    pad_id: int
    tokens_BT: np.ndarray  # int32, the end token kept as a row's last
    lengths_B: np.ndarray  # int32, at least 1
    depths_BT: np.ndarray  # int32
    logprobs_BT: np.ndarray  # float32, of the tempered, truncated distribution (greedy: plain)
    depth_logprobs_BT: np.ndarray  # float32, under the policy's law; 0 where nothing was drawn
    hazard_logits_BTE: np.ndarray | None  # float32, NaN at exits that were not reached
    truncated_B: np.ndarray  # bool: ran into `max_new_tokens` without an end token
    shape: tuple[int, int]  # padded prompt length and last cache size: what was compiled for
    seconds: float

    @property
    def rows(self) -> int:
        return len(self.lengths_B)

    @property
    def prompt_lengths_B(self) -> np.ndarray:
        lengths = np.asarray([len(prompt) for prompt in self.prompts], np.int32)
        return lengths[self.prompt_B]

    def completion(self, row: int) -> list[int]:
        """The generated tokens of a row, the end token included."""
        return self.tokens_BT[row, : self.lengths_B[row]].tolist()

    def sequences(self, length: int | None = None) -> Sequences:
        """Prompts and completions right-padded to `length` (None: the longest row's)."""
        prompt_B = self.prompt_lengths_B
        total_B = prompt_B + self.lengths_B
        longest = int(total_B.max())
        length = longest if length is None else length
        if length < longest:
            raise ValueError(
                f"sequences of length {length} cannot hold a prompt and completion of {longest} "
                "tokens; raise the length or lower max_new_tokens"
            )
        shape = (self.rows, length)
        tokens_BT = np.full(shape, self.pad_id, np.int32)
        depth_BT = np.full(shape, self.layers, np.int32)
        logprobs_BT = np.zeros(shape, np.float32)
        depth_logprobs_BT = np.zeros(shape, np.float32)
        for row in range(self.rows):
            prompt = self.prompts[self.prompt_B[row]]
            new, start, stop = self.lengths_B[row], prompt_B[row], total_B[row]
            tokens_BT[row, :start] = prompt
            tokens_BT[row, start:stop] = self.tokens_BT[row, :new]
            # The pass at position `start + i` produced generated token i + 1.
            produced = slice(start - 1, stop - 1)
            depth_BT[row, produced] = self.depths_BT[row, :new]
            logprobs_BT[row, produced] = self.logprobs_BT[row, :new]
            depth_logprobs_BT[row, produced] = self.depth_logprobs_BT[row, :new]
        position_T = np.arange(length)
        before_last_BT = position_T < total_B[:, None] - 1
        return Sequences(
            tokens_BT=tokens_BT,
            lengths_B=total_B.astype(np.int32),
            depth_BT=depth_BT,
            target_mask_BT=(position_T >= prompt_B[:, None] - 1) & before_last_BT,
            action_BT=(position_T >= prompt_B[:, None]) & before_last_BT,
            logprobs_BT=logprobs_BT,
            depth_logprobs_BT=depth_logprobs_BT,
        )


def rollout(
    model: Transformer | SplitModel,
    prompts: Sequence[Sequence[int]],
    *,
    policy: Policy = Full(),
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    eos_ids: Iterable[int],
    pad_id: int,
    key: PRNGKey | int,
    samples_per_prompt: int = 1,
    adapters: bool = True,
    hazards: bool = False,
    first_prompt: int = 0,
    total: int | None = None,
) -> Rollouts:
    """Generates `samples_per_prompt` completions of each prompt; one prefill serves them all.

    `model` is a `Transformer` or what `nnx.split(model, ...)` returned, which saves the splitting
    in a training loop; new parameter values never recompile. Temperature 0 is greedy. A row's draws
    depend on the key, `first_prompt` plus its prompt's index, the sample's index and the token's,
    not on the batch: `first_prompt` lets a long list run in chunks with the same result. With
    several hosts `prompts` are this host's of `total` (`jexit.dist.host_rows`), and `Prescribed`
    holds the depths of all. Raises ValueError when a prompt is empty or does not fit the model with
    its completion, or when `Prescribed` has too few rows or columns.
    """
    began = time.perf_counter()
    sampling = Sampling.of(temperature, top_p)
    graphdef, *states = nnx.split(model) if isinstance(model, nnx.Module) else model
    states = tuple(states)
    arch = nnx.merge(graphdef, *states).arch
    prompts = [[int(token) for token in prompt] for prompt in prompts]
    _check_prompts(arch, prompts, max_new_tokens)
    if samples_per_prompt < 1:
        raise ValueError(f"samples_per_prompt is {samples_per_prompt}; it must be at least 1")
    prompt_rows = host_rows(len(prompts) if total is None else total)
    rows_here = host_rows(prompt_rows.total * samples_per_prompt)
    policy = _fitted(policy, rows_here.total, max_new_tokens)

    longest = max(gather("the prompts' lengths", max(map(len, prompts))))
    prompt_slots = prompt_bucket(longest)
    most = prompt_slots + max_new_tokens - 1
    slots = cache_bucket(min(prompt_slots + max(16, prompt_slots // 8), most), most)
    tokens_BT = np.full((len(prompts), prompt_slots), pad_id, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, prompt_slots - len(prompt) :] = prompt

    rows, state = decode.prefill(
        graphdef,
        states,
        *place_rows(
            (tokens_BT, np.asarray([len(prompt) for prompt in prompts], np.int32)), prompt_rows
        ),
        np.asarray(sorted(eos_ids), np.int32),
        jax.random.key(key) if isinstance(key, int | np.integer) else key,
        np.int32(first_prompt),
        sampling,
        samples=samples_per_prompt,
        slots=slots,
        max_new_tokens=max_new_tokens,
        adapters=adapters,
        hazards=hazards,
    )
    while max_new_tokens > 1:
        state = decode.decode(
            graphdef,
            states,
            rows,
            state,
            policy,
            sampling,
            adapters=adapters,
            hazards=hazards,
        )
        with waiting("the rollouts"):
            done = slots >= most or bool(jnp.all(state.finished_B))
        if done:
            break
        slots = cache_bucket(slots + 1, most)
        state = decode.grow(state, slots=slots)

    with waiting("the rollouts"):
        records = fetch_rows(state.records, axis=1)
        length_B, finished_B = fetch_rows((state.length_B, state.finished_B))
    beyond_BT = np.arange(max_new_tokens) >= length_B[:, None]
    z_TBE = records.hazard_logits_TBE
    return Rollouts(
        prompts=prompts,
        prompt_B=prompt_rows.find(rows_here.index_B // samples_per_prompt),
        host_rows=rows_here,
        layers=arch.layers,
        pad_id=pad_id,
        tokens_BT=np.where(beyond_BT, np.int32(pad_id), records.tokens_TB.T),
        lengths_B=length_B,
        depths_BT=np.where(beyond_BT, 0, records.depths_TB.T),
        logprobs_BT=np.ascontiguousarray(records.logprobs_TB.T),
        depth_logprobs_BT=np.ascontiguousarray(records.depth_logprobs_TB.T),
        hazard_logits_BTE=None if z_TBE is None else np.moveaxis(z_TBE, 0, 1),
        truncated_B=~finished_B,
        shape=(prompt_slots, slots),
        seconds=time.perf_counter() - began,
    )


def _check_prompts(arch: Architecture, prompts: list[list[int]], max_new_tokens: int) -> None:
    if not prompts:
        raise ValueError("there are no prompts to complete; give at least one")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    most = arch.max_positions
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty; a prompt needs at least one token")
        if len(prompt) >= most:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens and the model takes {most} positions; "
                "shorten the prompt"
            )
        if len(prompt) + max_new_tokens > most:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens and with {max_new_tokens} new ones "
                f"exceeds the model's {most} positions; lower max_new_tokens to at most "
                f"{most - len(prompt)}"
            )
        if not 0 <= min(prompt) <= max(prompt) < arch.vocab_size:
            outside = next(token for token in prompt if not 0 <= token < arch.vocab_size)
            raise ValueError(
                f"prompt {index} holds token {outside} and the model's vocabulary has "
                f"{arch.vocab_size}; use the tokenizer that belongs to the model"
            )


def _fitted(policy: Policy, rows: int, columns: int) -> Policy:
    """`Prescribed` cut to the tokens that may be generated, so that its width never recompiles."""
    if not isinstance(policy, Prescribed):
        return policy
    shape = np.shape(policy.depth_BT)
    if len(shape) != 2 or shape[0] != rows or shape[1] < columns:
        raise ValueError(
            f"Prescribed has depths of shape {shape} for {rows} rows of up to {columns} tokens; "
            "give a row for each completion and a column for each token that may be generated"
        )
    return Prescribed(jnp.asarray(policy.depth_BT)[:, :columns])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Completions of text prompts, one entry a prompt; tokens end with the end token if it came."""

    texts: list[str]
    tokens: list[list[int]]
    depths: list[list[int]]  # of the pass that produced each token; the first is L
    logprobs: list[list[float]]
    depth_logprobs: list[list[float]]
    hazard_logits: list[list[list[float]]] | None  # an entry an exit, NaN where not reached
    truncated: list[bool]
    seconds: float


def generate(
    model: Transformer | SplitModel,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    policy: Policy = Full(),
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = True,
    adapters: bool = True,
    hazards: bool = False,
    batch_size: int = 64,
) -> Generation:
    """Completes texts under a halting policy; `tokenizer` is `jexit.data.tokenizer.Tokenizer`.

    `chat` puts each prompt into the tokenizer's chat format as the user's message. Temperature 0 is
    greedy. Raises ValueError as `rollout` does.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is one string and should be a list of them; put it in brackets")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    encode = tokenizer.encode_prompts if chat else tokenizer.encode_batch
    prompt_ids = encode(list(prompts))
    graphdef, *states = nnx.split(model) if isinstance(model, nnx.Module) else model
    arch = nnx.merge(graphdef, *states).arch
    _check_prompts(arch, prompt_ids, max_new_tokens)
    policy = _fitted(policy, len(prompt_ids), max_new_tokens)
    batch_size = min(batch_size, len(prompt_ids))
    parts: dict[str, list] = {field.name: [] for field in dataclasses.fields(Generation)}
    for start in range(0, len(prompt_ids), batch_size):
        # The last batch is filled up with its own last prompt rather than compiled anew.
        index = np.minimum(np.arange(start, start + batch_size), len(prompt_ids) - 1)
        part = rollout(
            (graphdef, *states),
            [prompt_ids[i] for i in index],
            policy=Prescribed(policy.depth_BT[index]) if isinstance(policy, Prescribed) else policy,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            eos_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
            key=seed,
            adapters=adapters,
            hazards=hazards,
            first_prompt=start,
        )
        parts["seconds"].append(part.seconds)
        for row in range(min(batch_size, len(prompt_ids) - start)):
            length = part.lengths_B[row]
            parts["tokens"].append(part.completion(row))
            parts["depths"].append(part.depths_BT[row, :length].tolist())
            parts["logprobs"].append(part.logprobs_BT[row, :length].tolist())
            parts["depth_logprobs"].append(part.depth_logprobs_BT[row, :length].tolist())
            parts["truncated"].append(bool(part.truncated_B[row]))
            if hazards:
                parts["hazard_logits"].append(part.hazard_logits_BTE[row, :length].tolist())
    parts["texts"] = [tokenizer.decode(tokens) for tokens in parts["tokens"]]
    return Generation(
        **parts
        | {
            "seconds": sum(parts["seconds"]),
            "hazard_logits": parts["hazard_logits"] if hazards else None,
        }
    )
