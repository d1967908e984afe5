"""Measures how fast a model with random weights decodes and trains on a device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jexit.config import Execution, ExitSettings, LoRA, OptimConfig, RLConfig, SFTConfig
from jexit.doctor.agreement import PORTABLE, seconds
from jexit.kernels import using
from jexit.kernels.chips import chip
from jexit.kernels.dispatch import AUTO, target
from jexit.loops.flops import ModelFlops, PassSize, mfu
from jexit.model.policies import Full, Prescribed
from jexit.model.transformer import Transformer
from jexit.presets import PRESETS, Architecture
from jexit.rollout import rollout
from jexit.steps.completions import Completions, pad_completions
from jexit.steps.optim import make_optimizer
from jexit.steps.rl import Penalties, RLBatch, make_rl_step
from jexit.steps.sft import make_sft_step
from jexit.steps.state import SplitModel, new_state, parameter_labels, split_model

# For CPUs, where a preset would take minutes and say little about the machine.
SMALL = dataclasses.replace(
    PRESETS["smollm2-135m"].architecture, width=192, layers=10, query_heads=6, kv_heads=2,
    head_dim=32, mlp_width=512, vocab_size=8_192,
)  # fmt: skip
FITTING = ("qwen3-1.7b", "qwen3-0.6b", "smollm2-135m")  # the first whose work fits
BYTES = 16  # of memory per parameter: weights, activations for the gradients, caches
ROLLOUTS = 4  # per prompt


@dataclasses.dataclass(frozen=True)
class Timing:
    """The speed of one kind of work, such as decoding.

    `implementation` is "auto" (jexit's default kernels) or "xla". `seconds` is the time of a
    training step, or of the pass that decodes one token per prompt. `mfu` is the fraction of the
    chip's peak FLOP/s that is used, or None if it is not known.
    """

    work: str
    implementation: str
    tokens_per_second: float
    seconds: float
    mfu: float | None = None


def fitting() -> tuple[str, Architecture]:
    """Returns the name and architecture of the largest preset in `FITTING` that fits the device.

    If none fits, returns the smallest; on a CPU, returns `SMALL`, a model of 10 layers.
    """
    if target().platform == "cpu":
        return "a small model", SMALL
    stats = jax.local_devices()[0].memory_stats() or {}
    memory = stats.get("bytes_limit", chip().memory_gib * 2**30)
    for name in FITTING[:-1]:
        if BYTES * parameters(PRESETS[name].architecture) <= memory:
            return name, PRESETS[name].architecture
    return FITTING[-1], PRESETS[FITTING[-1]].architecture


def parameters(arch: Architecture) -> int:
    """Returns the number of parameters of a model of this architecture with one exit head."""
    model = nnx.eval_shape(lambda: Transformer(arch, exit_layers=(1,), rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def timings(arch: Architecture, *, kernels: bool) -> Iterator[Timing]:
    """Yields the timings of decoding, of a calibration step and of a reinforcement step.

    With `kernels`, the work is timed on an accelerator with its default kernels first, and then
    with XLA alone.
    """
    on_cpu = target().platform == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    for implementation in (AUTO, PORTABLE) if kernels and not on_cpu else (PORTABLE,):
        jax.clear_caches()
        model = random_model(arch, dtype, Execution(attention=implementation))
        with using(implementation):
            yield from _measured(model, implementation, on_cpu)


def random_model(arch: Architecture, dtype: Any, execution: Execution = Execution()) -> Transformer:
    """Returns a model with random weights, a linear continuation and adapters of rank 8.

    It has an exit after every 5th layer.
    """
    layers = tuple(range(5, arch.layers, 5))
    return nnx.jit(
        lambda: Transformer(
            arch,
            exit_layers=layers,
            exit_head=ExitSettings(continuation="linear", detached=True),
            lora=LoRA(rank=8, alpha=16.0, targets=("q", "k", "v", "o")),
            dtype=dtype,
            execution=execution,
            rngs=nnx.Rngs(0),
        )
    )()


def _measured(model: Transformer, implementation: str, on_cpu: bool) -> Iterator[Timing]:
    prompts, prompt, new = (8, 16, 16) if on_cpu else (128, 128, 128)
    split = split_model(model, full=False)
    random = np.random.default_rng(0)
    prompt_ids = random.integers(0, model.arch.vocab_size, (prompts, prompt)).tolist()
    layers = model.arch.layers
    half = min(model.exit_layers, key=lambda layer: abs(2 * layer - layers))
    halves = Prescribed(np.full((prompts, new), half, np.int32))
    for name, policy in (("full depth", Full()), (f"depth {half} of {layers}", halves)):
        for _ in range(2):  # the second compiles nothing
            made = rollout(
                split.decodable(split.trainable), prompt_ids, policy=policy, max_new_tokens=new,
                eos_ids=(), pad_id=0, key=0,
            )  # fmt: skip
        speed = float(made.lengths_B.sum()) / made.seconds
        yield Timing(f"decoding, {name}", implementation, speed, prompts / speed)

    rows, prompt, new = (4, 32, 32) if on_cpu else (8, 256, 256)
    batch = random_rollouts(model, rows=rows, prompt=prompt, new=new)
    flops = ModelFlops.of(model, full=False)
    size = PassSize.of(np.full(rows, prompt + new))
    sft = SFTConfig(samples=1)
    for stage, step, counted in (
        ("calibration", sft_step(model, split, sft, batch.rows),
         flops.sft_step(size, rows * new, samples=1, target=sft.target)),
        ("reinforcement", rl_step(model, split, RLConfig(rollouts=ROLLOUTS), batch),
         flops.rl_step(size, rows * new, updates=1)),
    ):  # fmt: skip
        taken, tokens = seconds(step, 3), rows * (prompt + new)
        share = mfu(counted, taken, 1).get("mfu")
        yield Timing(f"{stage} step", implementation, tokens / taken, taken, share)


def random_rollouts(model: Transformer, *, rows: int, prompt: int, new: int) -> RLBatch:
    """Returns `rows` rollouts of random tokens, to time a reinforcement step.

    All rollouts have the same prompt of `prompt` tokens, followed by `new` tokens. Rewards
    alternate between 0 and 1.
    """
    random = np.random.default_rng(0)
    vocab = model.arch.vocab_size
    completions = pad_completions(
        [random.integers(0, vocab, prompt).tolist()] * rows,
        random.integers(0, vocab, (rows, new)).tolist(),
        0,
        (prompt + new, new),
    )
    depth_JW = random.choice([*model.exit_layers, model.arch.layers], (rows, new))
    return RLBatch(
        rows=completions,
        lengths_J=jnp.full(rows, new, jnp.int32),
        depth_JW=jnp.asarray(depth_JW, jnp.int32),
        logprobs_JW=jnp.full((rows, new), -2.0),
        depth_logprobs_JW=jnp.full((rows, new), -1.0),
        verifier_J=jnp.arange(rows) % 2 * 1.0,
        truncated_J=jnp.zeros(rows, bool),
    )


def sft_step(model: Transformer, split: SplitModel, config: SFTConfig, rows: Completions) -> Any:
    """Returns a function without arguments that runs one calibration step on `rows`.

    The function is already compiled. It returns the step's metrics.
    """
    return _step(model, split, functools.partial(make_sft_step, config=config), rows)


def rl_step(model: Transformer, split: SplitModel, config: RLConfig, batch: RLBatch) -> Any:
    """Returns a function without arguments that runs one reinforcement step on `batch`.

    The function is already compiled. It returns the step's metrics.
    """
    make = functools.partial(make_rl_step, config=config)
    return _step(model, split, make, batch, Penalties(0.5, 0.0))


def _step(model: Transformer, split: SplitModel, make: Any, *batch: Any) -> Any:
    optimizer = make_optimizer(OptimConfig(), 100, parameter_labels(model, full=False))
    step = make(split, optimizer)
    # A step reuses the memory of its state, so the state is a copy of the model's parameters.
    state = new_state(jax.tree.map(jnp.copy, split.trainable), optimizer)
    held = {"state": state}
    key = jax.random.key(0)

    def run() -> Any:
        held["state"], metrics = step(held["state"], split.fixed, *batch, key)
        return metrics

    jax.block_until_ready(run())
    return run
