"""jexit against Hugging Face transformers on a real checkpoint, float32 on CPU; one line a claim.

    python tests/benchmarks/hf_parity.py --checkpoint=HF_DIR --gsm8k=DIR_OF_JSONL

Converts the checkpoint, then compares logits, greedy decoding, prescribed depths and the checkpoint
exported again on the chat prompts of GSM8K's first test problems. Exits with 1 when a claim fails.
Takes some minutes for a model of 0.5B parameters, and about ten bytes of memory a parameter.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.utils import logging  # noqa: E402

import jexit  # noqa: E402
from hf_models import freeze_by_hand  # noqa: E402
from jexit.config import ExitSettings  # noqa: E402
from jexit.io.model_dir import load  # noqa: E402
from jexit.tasks.gsm8k import Gsm8k  # noqa: E402
from tolerances import LOGITS_REAL  # noqa: E402

PROMPTS = 20
NEW_TOKENS = 64
RECORDED = 1e-4  # largest difference of a recorded log-probability from that of `forward`
BUCKET = 64  # prompts are right-padded to a multiple of this
MEMORY = 1.3  # of the checkpoint's size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
    parser.add_argument("--gsm8k", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        held = list(claims(arguments.checkpoint, arguments.gsm8k, pathlib.Path(scratch)))
    return 0 if all(held) else 1


def claims(checkpoint: pathlib.Path, gsm8k: pathlib.Path, scratch: pathlib.Path) -> Iterator[bool]:
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    peak = convert("from_hf", checkpoint, scratch / "jexit")
    yield claim(
        "from_hf: peak memory of the process",
        peak < MEMORY * size,
        f"{peak / 1e6:,.0f} MB, {peak / size:.2f} × the checkpoint (< {MEMORY})",
    )
    peak = convert("to_hf", scratch / "jexit", scratch / "hf")
    yield claim(
        "to_hf: peak memory of the process",
        peak < MEMORY * size,
        f"{peak / 1e6:,.0f} MB, {peak / size:.2f} × the checkpoint (< {MEMORY})",
    )

    head = ExitSettings(continuation="linear")
    model, tokenizer = load(scratch / "jexit", dtype="float32", exit_head=head)
    task = Gsm8k(path=gsm8k)
    messages = [task.problem("test", index).prompt for index in range(PROMPTS)]
    prompts = [tokenizer.encode_prompt(message) for message in messages]
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    full = [0.0, 0, 0]
    frozen = [0.0, 0, 0]
    linear = [0.0, 0, 0]
    rng = np.random.default_rng(0)
    update = model.blocks.continuation.update
    at_start = update.kernel[...], update.bias[...]
    # The residual's length changes by about a tenth in every layer that is skipped.
    moved = tuple(
        0.1 * part.shape[1] ** -0.5 * rng.normal(size=part.shape).astype(np.float32)
        for part in at_start
    )
    for prompt in prompts:
        tokens_BT = np.full((1, -(-len(prompt) // BUCKET) * BUCKET), tokenizer.pad_id)
        tokens_BT[0, : len(prompt)] = prompt
        lengths_B = np.asarray([len(prompt)])
        with torch.no_grad():
            truth = theirs(torch.tensor([prompt])).logits[0].numpy()
        found = jexit.forward(model, tokens_BT, lengths_B, policy=jexit.Full())
        add(full, found.logits_BTV[0, : len(prompt)], truth)
        depths = [*model.exit_layers, model.arch.layers]
        depth_BT = rng.choice(depths, tokens_BT.shape)
        for total, maps in ((frozen, at_start), (linear, moved)):
            update.kernel[...], update.bias[...] = map(jnp.asarray, maps)
            with torch.no_grad():
                truth = freeze_by_hand(
                    theirs,
                    [prompt],
                    depth_BT[:, : len(prompt)],
                    continuation=tuple(torch.tensor(np.asarray(part)) for part in maps),
                )[0].numpy()
            found = jexit.forward(model, tokens_BT, lengths_B, policy=jexit.Prescribed(depth_BT))
            add(total, found.logits_BTV[0, : len(prompt)], truth)
    gap, count = recorded_gap(model, tokenizer, messages, rng)
    yield claim(
        "decoding at random depths with that continuation: recorded log-probabilities",
        gap <= RECORDED,
        f"max |Δ| from those of forward {gap:.1e} (≤ {RECORDED:g}), {count} tokens",
    )
    update.kernel[...], update.bias[...] = at_start
    for name, (gap, same, positions) in (
        ("full depth", full),
        ("prescribed random depths, against freezing by hand", frozen),
        ("the same with a random linear continuation, by hand", linear),
    ):
        yield claim(
            f"{name}: logits",
            gap <= LOGITS_REAL and same == positions,
            f"max |Δ| {gap:.1e} (≤ {LOGITS_REAL:g}), arg-max equal at {same} of {positions} "
            f"positions of {PROMPTS} prompts",
        )

    ours = jexit.generate(model, tokenizer, messages, max_new_tokens=NEW_TOKENS, temperature=0.0)
    same = ended = 0
    for prompt, tokens in zip(prompts, ours.tokens, strict=True):
        ids = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=sorted(tokenizer.eos_ids),
            pad_token_id=tokenizer.pad_id,
        )
        same += ids[0, len(prompt) :].tolist() == tokens
        ended += tokens[-1] in tokenizer.eos_ids
    yield claim(
        "greedy decoding",
        same == PROMPTS,
        f"{same} of {PROMPTS} completions equal token for token, {NEW_TOKENS} tokens at most, "
        f"{ended} ended before",
    )

    again = AutoModelForCausalLM.from_pretrained(scratch / "hf", dtype=torch.float32).eval()
    state = theirs.state_dict()
    equal = sum(torch.equal(state[name], tensor) for name, tensor in again.state_dict().items())
    with torch.no_grad():
        tokens = torch.tensor([prompts[0]])
        gap = (again(tokens).logits - theirs(tokens).logits).abs().max().item()
    yield claim(
        "to_hf: the exported checkpoint in transformers",
        equal == len(state) == len(again.state_dict()) and gap == 0.0,
        f"{equal} of {len(state)} tensors bit for bit, max |Δ logit| {gap:.1e}",
    )


def recorded_gap(
    model: Any, tokenizer: Any, messages: list[str], rng: np.random.Generator
) -> tuple[float, int]:
    """The largest difference between recorded and `forward`'s log-probabilities; their count."""
    layers = model.arch.layers
    depth_BT = rng.choice([*model.exit_layers, layers], (len(messages), NEW_TOKENS))
    made = jexit.generate(
        model, tokenizer, messages, policy=jexit.Prescribed(depth_BT),
        max_new_tokens=NEW_TOKENS, temperature=1.0,
    )  # fmt: skip
    gap, count = 0.0, 0
    for row, message in enumerate(messages):
        prompt, new = tokenizer.encode_prompt(message), made.tokens[row]
        text = [*prompt, *new[:-1]]
        tokens_BT = np.full((1, -(-len(text) // BUCKET) * BUCKET), tokenizer.pad_id)
        passes_BT = np.full_like(tokens_BT, layers)
        tokens_BT[0, : len(text)] = text
        passes_BT[0, len(prompt) : len(text)] = made.depths[row][1:]
        out = jexit.forward(
            model, tokens_BT, np.asarray([len(text)]), policy=jexit.Prescribed(passes_BT)
        )
        logits_TV = np.asarray(out.logits_BTV[0, len(prompt) - 1 : len(text)], np.float64)
        normal_T = np.logaddexp.reduce(logits_TV, axis=-1)
        wanted_T = logits_TV[np.arange(len(new)), new] - normal_T
        gap = max(gap, float(np.abs(wanted_T - made.logprobs[row]).max()))
        count += len(new)
    return gap, count


def convert(name: str, source: pathlib.Path, target: pathlib.Path) -> int:
    """Runs one conversion as its own process; returns its peak memory in bytes."""
    command = [sys.executable, "-m", f"convert.{name}", f"--source={source}", f"--target={target}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"convert.{name} failed")
    return usage.ru_maxrss * 1024


def add(total: list[Any], found: Any, truth: np.ndarray) -> None:
    found = np.asarray(found)
    total[0] = max(total[0], float(np.abs(found - truth).max()))
    total[1] += int((found.argmax(-1) == truth.argmax(-1)).sum())
    total[2] += len(truth)


def claim(name: str, holds: bool, figure: str) -> bool:
    print(f"{'ok  ' if holds else 'FAIL'}  {name}: {figure}", flush=True)
    return holds


if __name__ == "__main__":
    sys.exit(main())
