"""Speed of a fine-tuning step against google-tunix's PEFT trainer, as a ratio.

    python -m pip install google-tunix     # into an environment of its own, before jexit
    python tests/benchmarks/tunix_finetune.py [--rows 16] [--full]

A Qwen2 model of 4 layers and width 256 with random weights over a vocabulary of 32,000, on the CPU
in float32: LoRA of rank 8 on q, k, v and o, or with --full all weights; AdamW; cross-entropy on
completions after their prompts. `equal`: all sequences of one length; `mixed`: of 40 to 128 tokens,
which tunix pads to the longest and jexit packs. A step is timed from numbers on the host to the
loss on the host; nothing is compiled while the clock runs. Alternatives take turns; medians.
Exits 1 when jexit is slower in either.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable

import numpy as np

VOCABULARY, LENGTH, PROMPT = 32_000, 128, 0.6
TARGETS = ("q", "k", "v", "o")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--full", action="store_true", help="train all weights")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from decode import in_turns
    from tunix_sampler import write_random

    from jexit.presets import Architecture

    arch = Architecture(
        family="qwen2", vocab_size=VOCABULARY, width=256, layers=4, query_heads=4, kv_heads=2,
        head_dim=64, mlp_width=1024, rope_theta=1e6, rms_norm_eps=1e-6, tied=True,
        max_positions=1024,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    lengths = {
        "equal": np.full(arguments.rows, LENGTH),
        "mixed": rng.integers(40, LENGTH + 1, arguments.rows),
    }
    slower = False
    with tempfile.TemporaryDirectory() as folder:
        write_random(pathlib.Path(folder), arch)
        for name, lengths_B in lengths.items():
            texts = [rng.integers(1, VOCABULARY, length).tolist() for length in lengths_B]
            prompts = [text[: int(PROMPT * len(text))] for text in texts]
            completions = [text[int(PROMPT * len(text)) :] for text in texts]
            runs = {
                "jexit": with_jexit(folder, prompts, completions, full=arguments.full),
                "tunix": with_tunix(folder, arch, prompts, completions, full=arguments.full),
            }
            first = {who: run() for who, run in runs.items()}
            seconds = in_turns(runs, arguments.repeats)
            ratio = float(np.median(seconds["tunix"][:, 0] / seconds["jexit"][:, 0]))
            slower |= ratio < 1.0
            print(
                f"{name}: {arguments.rows} sequences, {sum(map(len, texts))} tokens: jexit "
                f"{ratio:.2f} times as fast as tunix; first losses {first['jexit']:.5f} and "
                f"{first['tunix']:.5f}",
                flush=True,
            )
    sys.exit(1 if slower else 0)


def with_jexit(
    folder: str, prompts: list[list[int]], completions: list[list[int]], *, full: bool
) -> Callable[[], float]:
    import optax

    from jexit.config import LoRA
    from jexit.io.model_dir import load
    from jexit.loops.packing import Lengths, PackedShapes
    from jexit.steps.completions import pack_completions
    from jexit.steps.finetune import make_finetune_step
    from jexit.steps.state import new_state, split_model, step_key

    lora = None if full else LoRA(rank=8, alpha=16.0, dropout=0.0, targets=TARGETS)
    model, _ = load(folder, dtype="float32", lora=lora)
    split = split_model(model, full=full, keep_teacher=False)
    optimizer = optax.adamw(1e-4)
    step = make_finetune_step(split, optimizer)
    shapes = PackedShapes(1, 1, model.arch.width, LENGTH, lambda length: True)
    state = new_state(split.trainable, optimizer)
    counted = [0]

    def run() -> float:
        nonlocal state
        prompt_J, completion_J = (
            np.asarray([len(ids) for ids in side]) for side in (prompts, completions)
        )
        packed = shapes.fit(Lengths(prompt_J, np.arange(len(prompt_J)), completion_J))
        shape = packed.shape
        batch = pack_completions(
            prompts, completions, 0, row_of=packed.row_of_J,
            shape=(shape.rows, shape.length, shape.width), numbers=np.arange(len(prompts)),
        )  # fmt: skip
        state, metrics = step(state, split.fixed, batch, step_key(0, counted[0]))
        counted[0] += 1
        return float(metrics["loss"])

    return run


def with_tunix(
    folder: str,
    arch: object,
    prompts: list[list[int]],
    completions: list[list[int]],
    *,
    full: bool,
) -> Callable[[], float]:
    import jax
    import optax
    import qwix
    from tunix.sft import peft_trainer, utils
    from tunix_sampler import tunix_mesh, tunix_model

    model = tunix_model(folder, arch)
    if not full:
        provider = qwix.LoraProvider(
            module_path=".*q_proj|.*k_proj|.*v_proj|.*o_proj", rank=8, alpha=16.0
        )
        with jax.set_mesh(tunix_mesh()):  # flax makes the adapters with their shardings
            model = qwix.apply_lora_to_model(model, provider, **model.get_model_input())
    trainer = peft_trainer.PeftTrainer(
        model, optax.adamw(1e-4), peft_trainer.TrainingConfig(eval_every_n_steps=10**9)
    ).with_gen_model_input_fn(
        lambda data: {
            "input_tokens": data.input_tokens,
            "input_mask": data.input_mask,
            "positions": utils.build_positions_from_mask(data.input_tokens != 0),
            "attention_mask": utils.make_causal_attn_mask(data.input_tokens != 0),
        }
    )
    step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)

    def run() -> float:
        longest = max(len(a) + len(b) for a, b in zip(prompts, completions, strict=True))
        tokens_BT = np.zeros((len(prompts), longest), np.int32)
        learnt_BT = np.zeros(tokens_BT.shape, bool)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            tokens_BT[row, : len(prompt) + len(completion)] = prompt + completion
            learnt_BT[row, len(prompt) : len(prompt) + len(completion)] = True
        loss, *_ = step(peft_trainer.TrainingInput(tokens_BT, learnt_BT))
        return float(loss)

    return run


if __name__ == "__main__":
    main()
