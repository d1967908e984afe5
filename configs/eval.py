"""Measures the accuracy and the depth of a model under several halting policies.

    python -m jexit.main --config=configs/eval.py --config.model.path=runs/rl-tiny

The default preset, `tiny`, takes two minutes on two CPU cores. It measures the shipped calibrated
model under seven policies.
"""

from jexit.config import EVAL_MEASURES, TINY_CALIBRATED_PATH, config_dict


def get_config(preset: str = "tiny"):
    config = config_dict("eval", preset)
    if config.preset == "tiny":
        config.model.path = TINY_CALIBRATED_PATH
        config.eval.policies = (
            *("full", "sample", "shuffled", "fixed:matched"),
            *("threshold:0.3", "threshold:0.5", "threshold:0.7"),
        )
        config.eval.measures = EVAL_MEASURES
        config.eval.max_new_tokens = 56
        return config
    config.model.path = f"runs/rl-{config.preset}"
    config.task.name = "gsm8k"
    config.eval.max_new_tokens = 512
    config.eval.policies = ("full", "sample", "shuffled", "fixed:matched", "threshold:0.5")
    config.eval.measures = tuple(name for name in EVAL_MEASURES if name != "capacity")
    return config
