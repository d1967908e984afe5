"""The studies on the shipped model: what a depth penalty saves, and what it does to the reasoning.

    bash studies/evidence.sh [--jobs=2]

runs everything below in order, into runs/evidence-*, and goes on where it was stopped. A run of
reinforcement takes some ten minutes on one CPU core, its measurement as long. The variants:

`reinforce`   the depth penalty of `rl.depth_norm` and `rl.depth_coef`, from the calibrated model
`no_exits`    reinforcement at full depth: one exit, whose hazard stays near 0
`fixed_exit`  reinforcement with all tokens leaving at one exit, the only one of `exits.layers`
`small`       fine-tunes a trunk that was cut to its first layers (convert.from_hf --layers)
`relearn`     fine-tunes a reinforced model on large steps for 50 updates, at full depth or under
              its exits (`finetune.policy`)
`measure`     policies, controls and every measure; `compare` the policies alone
"""

import configs.eval
import configs.finetune
import configs.rl

SHUT = -30.0  # of a head's bias: its hazard is 1e-13
ALWAYS = 1 - 1e-6  # the least hazard with which every token leaves at the first exit


def get_config(variant: str = "reinforce"):
    variants = {
        "reinforce": _reinforce,
        "no_exits": _no_exits,
        "fixed_exit": _fixed_exit,
        "small": _small,
        "relearn": _relearn,
        "measure": _measure,
        "compare": _compare,
    }
    if variant not in variants:
        raise ValueError(f"evidence has no variant {variant!r}; choose {', '.join(variants)}")
    return variants[variant]()


def _reinforce():
    config = configs.rl.get_config("tiny")
    config.rl.depth_norm = "total"
    config.rl.length_ref = 21.0  # tokens of the calibrated model's answers to sums
    config.checkpoint.every = 50
    return config


def _no_exits():
    config = _reinforce()
    config.exits.layers = (1,)
    config.exit_head.bias = SHUT
    config.optim.exit_lr = 0.0
    config.rl.depth_coef = 0.0
    return config


def _fixed_exit():
    config = _reinforce()
    config.rl.min_hazard = ALWAYS
    config.optim.exit_lr = 0.0
    config.rl.depth_coef = 0.0
    return config


def _small():
    config = configs.finetune.get_config("tiny")
    config.steps = 400
    config.batch_size = 64
    config.task.name = "sums"
    config.task.options = {"steps": "mixed"}
    config.optim.full_lr = 1e-3
    config.eval.problems = 256
    return config


def _relearn():
    config = configs.finetune.get_config("tiny")
    config.steps = 50
    config.batch_size = 64
    config.lora.rank = 8
    config.task.name = "sums"
    config.task.options = {"steps": 5}
    config.optim.lora_lr = 1e-3
    config.eval.problems = 256
    return config


def _measure():
    config = configs.eval.get_config("tiny")
    config.eval.policies = ("full", "sample", "shuffled", "fixed:matched", "threshold:0.5")
    config.eval.heat_maps = 4
    return config


def _compare():
    config = _measure()
    config.eval.measures = ()
    config.eval.heat_maps = 0
    return config
