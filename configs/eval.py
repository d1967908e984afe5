"""Measures accuracy and depth of a model under halting policies.

    python -m jexit.main --config=configs/eval.py --config.model.path=runs/rl-tiny

`tiny` measures the shipped calibrated model under five policies: two minutes on two CPU cores.
"""

from jexit.config import TINY_CALIBRATED_PATH, config_dict


def get_config(preset: str = "tiny"):
    config = config_dict("eval", preset)
    if config.preset == "tiny":
        config.model.path = TINY_CALIBRATED_PATH
        config.eval.policies = ("full", "sample", "threshold:0.3", "threshold:0.5", "fixed:4")
        config.eval.max_new_tokens = 48
        return config
    config.model.path = f"runs/rl-{config.preset}"
    config.task.name = "gsm8k"
    config.eval.max_new_tokens = 512
    return config
