"""Study F: Qwen2.5-Coder-0.5B as it is, on GSM8K: both phases of calibration, then reinforcement.

    python -m convert.from_hf --source=Qwen/Qwen2.5-Coder-0.5B-Instruct --target=models/qwen
    bash studies/qwen.sh

The second command runs every stage below, in order, and goes on where it was stopped. GSM8K comes
as README.md says.
"""

import pathlib
import runpy

PRESET = "qwen2.5-0.5b"  # the same shapes
CONFIGS = pathlib.Path(__file__).parents[1]
STAGES = {"calibrate": "sft", "reinforce": "rl", "measure": "eval"}


def get_config(variant: str = "measure"):
    if variant not in STAGES:
        raise ValueError(f"qwen has no stage {variant!r}; choose {', '.join(STAGES)}")
    config = runpy.run_path(str(CONFIGS / f"{STAGES[variant]}.py"))["get_config"](PRESET)
    config.exits.layers = (4, 8, 12, 16, 18, 20, 22)
    config.optim.accumulate = 1
    config.eval.problems = 16  # before and after training; what is measured has 200
    config.eval.max_new_tokens = 512
    if variant == "calibrate":
        config.model.path = "models/qwen"
        config.lora.rank = 16
        config.lora.alpha = 32.0
        config.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")
        config.sft.pool = 384
        config.sft.generate_batch = 96
        config.sft.temperature = 0.7
        config.sft.lens_steps = 80
        config.sft.lens_exits = "one"
        config.sft.sharpness = 60.0
        config.sft.explore = 0.1
        config.sft.samples = 1
        config.steps = 40
        config.batch_size = 8
        config.optim.lora_lr = 1e-4
        config.optim.exit_lr = 1e-3
        config.optim.schedule = "cosine"
        config.optim.final_fraction = 0.1
        config.optim.warmup_steps = 5
        config.checkpoint.every = 10
        return config
    if variant == "reinforce":
        config.model.path = "runs/qwen-sft"
        config.steps = 24
        config.batch_size = 4
        config.rl.rollouts = 6
        config.rl.depth_coef = 0.5
        config.rl.warmup_steps = 8
        config.checkpoint.every = 2
        return config
    config.model.path = "runs/qwen-sft"
    config.eval.problems = 200
    at = "threshold:0.9"
    others = ("full", "threshold:0.95", "threshold:0.8")
    config.eval.policies = (*others, at, f"shuffled:{at}", f"fixed:matched:{at}")
    config.eval.measured = at
    config.eval.measures = ("exits",)
    config.eval.heat_maps = 4
    return config
