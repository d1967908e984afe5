"""Accuracy of a checkpoint in transformers beside an evaluation of it under `full`.

    python -m jexit.main --config=configs/eval.py:qwen2.5-0.5b --workdir=runs/base \
        --config.model.path=MODEL_DIR --config.eval.problems=60 --config.eval.policies='("full",)'
    python tests/benchmarks/accuracy.py --checkpoint=HF_DIR --run=runs/base [--batch=8]

Decodes the evaluation's own problems with transformers' `generate`, greedily, in float32 on the
CPU, and judges the text with the same task. Exits 1 when that accuracy is outside the evaluation's
95 % interval.
"""

import argparse
import json
import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM

from jexit.config import Config
from jexit.data.tokenizer import Tokenizer
from jexit.evaluation.accuracy import held_out
from jexit.loops.setup import load_task


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
    parser.add_argument("--run", type=pathlib.Path, required=True)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()

    config = Config.from_dict(json.loads((arguments.run / "config.json").read_text()))
    if config.eval.temperature:
        parser.error(f"--run was evaluated at temperature {config.eval.temperature:g}; take 0")
    runs = json.loads((arguments.run / "eval.json").read_text())["runs"]
    ours = next(run for run in runs if run["policy"] == "full")
    tokenizer = Tokenizer.load(config.model.path)
    tokenizer.thinking = config.task.thinking
    task = load_task(config.task, config.eval.split)
    problems, prompts = held_out(task, tokenizer, config, config.eval.problems)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()

    right = 0
    for start in range(0, len(prompts), arguments.batch):
        batch = prompts[start : start + arguments.batch]
        width = max(map(len, batch))
        ids_BT = torch.full((len(batch), width), tokenizer.pad_id)
        mask_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(batch):
            ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
            mask_BT[row, width - len(prompt) :] = 1
        made_BT = model.generate(
            ids_BT,
            attention_mask=mask_BT,
            do_sample=False,
            max_new_tokens=config.eval.max_new_tokens,
            eos_token_id=sorted(tokenizer.eos_ids),
            pad_token_id=tokenizer.pad_id,
        )
        for row, problem in enumerate(problems[start : start + arguments.batch]):
            ids = made_BT[row, width:].tolist()
            cut = tokenizer.eos_ids.isdisjoint(ids)
            text = task.answerable(tokenizer.completion_text(ids), cut=cut)
            right += task.verify(problem, text).correct
        print(f"{start + len(batch)} of {len(prompts)}: {right} right", flush=True)
    low, high = ours["accuracy_ci95"]
    theirs = right / len(prompts)
    print(
        f"{len(prompts)} problems of {config.task.name}: transformers {theirs:.1%}, jexit "
        f"{ours['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%})"
    )
    return 0 if low <= theirs <= high else 1


if __name__ == "__main__":
    sys.exit(main())
