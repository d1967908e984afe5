"""Completes prompts, and prints how many layers ran for each token.

    python -m jexit.main --config=configs/generate.py \
        --config.generate.prompts='("sum 3729518",)'
"""

from jexit.config import TINY_CALIBRATED_PATH, config_dict


def get_config(preset: str = "tiny"):
    config = config_dict("generate", preset)
    if config.preset == "tiny":
        config.model.path = TINY_CALIBRATED_PATH
        config.generate.prompts = ("sum 3729518", "sum by 2 40917")
        config.generate.max_new_tokens = 56
        return config
    config.model.path = f"runs/rl-{config.preset}"
    return config
