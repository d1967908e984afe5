"""Study F: calibrates Qwen2.5-Coder-0.5B on GSM8K, with and without a frozen trunk, then runs RL.

    python -m convert.from_hf --source=Qwen/Qwen2.5-Coder-0.5B-Instruct --target=models/qwen
    bash studies/qwen.sh

The second command runs all stages below, and resumes where it was stopped. docs/tasks.md
explains how to obtain GSM8K.
"""

import configs.eval
import configs.rl
import configs.sft

PRESET = "qwen2.5-0.5b"  # the same shapes
STAGES = {
    "calibrate": configs.sft,
    "reinforce": configs.rl,
    "measure": configs.eval,
    "control": configs.eval,
}


def get_config(variant: str = "measure"):
    if variant not in STAGES:
        raise ValueError(f"qwen has no stage {variant!r}; choose {', '.join(STAGES)}")
    config = STAGES[variant].get_config(PRESET)
    # Tokens that leave in the first quarter give later ones keys and values that mislead them.
    config.exits.layers = (8, 12, 14, 16, 18, 20, 22)
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")
    config.optim.accumulate = 1
    config.eval.problems = 16  # before and after training; what is measured has 200
    config.eval.max_new_tokens = 512
    if variant == "calibrate":
        config.model.path = "models/qwen"
        config.sft.pool = 384
        config.sft.generate_batch = 96
        config.sft.temperature = 0.7
        config.sft.samples = 1
        config.steps = 30
        config.batch_size = 8
        config.optim.lora_lr = 5e-5
        config.optim.schedule = "cosine"
        config.optim.final_fraction = 0.1
        config.optim.warmup_steps = 5
        config.checkpoint.every = 500
        return config
    if variant == "reinforce":
        config.model.path = "runs/qwen-lens"
        config.seed = 1  # other problems than those of calibration
        config.steps = 24
        config.batch_size = 4
        config.rl.rollouts = 6
        config.rl.kl_loss_coef = 1.0  # exact, on the model's own samples: repairs what exits cost
        config.rl.depth_norm = "total"
        config.rl.length_ref = 170.0
        config.rl.depth_coef = 1.0
        config.rl.warmup_steps = 8
        config.optim.lora_lr = 1e-4
        config.optim.exit_lr = 3e-5
        config.optim.warmup_steps = 3
        config.checkpoint.every = 2
        return config
    config.model.path = "runs/qwen-lens"
    # Leaving is expected to cost at most 0.0125, 0.05 and 0.12 nats at hazards over .8, .5 and .3.
    at = "threshold:0.5"
    config.eval.measured = at
    if variant == "control":  # on fewer problems, as most completions run into the limit
        config.eval.problems = 48
        config.eval.policies = (at, f"shuffled:{at}", f"fixed:matched:{at}")
        return config
    config.eval.problems = 200
    config.eval.policies = ("full", at, "threshold:0.8", "threshold:0.3")
    config.eval.measures = ("exits",)
    config.eval.heat_maps = 4
    return config
