"""Trains a model by reinforcement learning to answer correctly while running few layers.

    python -m jexit.main --config=configs/rl.py

The default preset, `tiny`, trains the shipped calibrated model on `sums` in about ten minutes on
two CPU cores. The accuracy rises from 89 to 100 %, and the depth falls from 63 to 52 % of all
layers (from 108 to 67 layers per problem).

    python -m jexit.main --config=configs/rl.py:qwen2.5-0.5b

Other presets train the model in runs/sft-PRESET on GSM8K. qwen2.5-0.5b has been run on CPU for two
updates with short completions; no whole run has been timed.
"""

from jexit.config import TINY_CALIBRATED_PATH, config_dict


def get_config(preset: str = "tiny"):
    config = config_dict("rl", preset)
    if config.preset == "tiny":
        config.model.path = TINY_CALIBRATED_PATH
        config.steps = 200
        config.batch_size = 24
        config.rl.rollouts = 8
        config.rl.max_new_tokens = 56
        config.rl.depth_coef = 2.0
        config.rl.kl_coef = 0.01
        config.optim.lora_lr = 1e-3
        config.optim.exit_lr = 5e-3
        config.optim.schedule = "cosine"
        config.optim.final_fraction = 0.1
        config.eval.problems = 256
        config.eval.max_new_tokens = 56
        config.checkpoint.every = 25
        return config
    config.model.path = f"runs/sft-{config.preset}"
    config.task.name = "gsm8k"
    config.steps = 200
    config.batch_size = 16
    config.optim.accumulate = 8  # micro-batches of 12 rollouts: over 4 shares of rows, or 2 or 3
    config.model.remat = "block"
    config.rl.max_new_tokens = 512
    config.rl.warmup_steps = 40
    # A weak start learns to answer first: no penalty before it has the accuracy of the full depth,
    # and no answer costs what a wrong one does, or saying anything at once would be the way out.
    config.rl.accuracy_floor = 0.9
    config.rl.floor_of = "initial"
    config.task.reward_none = 0.0
    config.rl.hazard_temperature = 0.5  # as it is calibrated
    config.rl.temperature = 0.7 if config.preset.startswith("qwen3") else 1.0
    config.checkpoint.every = 20
    config.checkpoint.keep_best = 1
    return config
