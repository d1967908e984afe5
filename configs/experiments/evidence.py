"""The studies on the shipped model: what a depth penalty saves, and how it changes the reasoning.

    bash studies/evidence.sh [--jobs=2]

runs all studies in order, writes into runs/evidence-*, and resumes where it was stopped. An RL run
takes about ten minutes on one CPU core, and its evaluation as long. The variants:

`reinforce`   RL from the calibrated model, with the depth penalty of `rl.depth_norm` and
              `rl.depth_coef`
`full_depth`  RL of a trunk whose tokens never leave early
`small`       fine-tunes a trunk that was cut to its first layers (convert.from_hf --layers)
`relearn`     fine-tunes a model after RL on steps of five digits for 50 updates, at full depth or
              under its exits (`finetune.policy`)
`measure`     evaluates policies, controls and every measure on sums; `measure_word_problems` does
              so on word problems, which have no prescribed steps
`measure_full` evaluates accuracy and prescribed steps at full depth only; `measure_chain` evaluates
              what the answer owes to the chain of thought there, for models without early exits
`compare`     evaluates full depth and sampled exits, without measures
"""

import configs.eval
import configs.finetune
import configs.rl
from jexit.config import CHAIN_MEASURES, EVAL_MEASURES

NEVER = -30.0  # the bias of a head that never lets a token leave


def get_config(variant: str = "reinforce"):
    variants = {
        "reinforce": _reinforce,
        "full_depth": _full_depth,
        "small": _small,
        "relearn": _relearn,
        "measure": lambda: _measure("sums"),
        "measure_word_problems": lambda: _measure("word_problems"),
        "measure_full": lambda: _measure_full("capacity"),
        "measure_chain": lambda: _measure_full("serial_depth", *CHAIN_MEASURES),
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


def _full_depth():
    config = _reinforce()
    config.exits.layers = (1,)
    config.exit_head.bias = NEVER
    config.optim.exit_lr = 0.0
    config.rl.depth_coef = 0.0
    return config


def _small():
    config = configs.finetune.get_config("tiny")
    config.steps = 400
    config.batch_size = 64
    config.exits.layers = (1,)  # below the last of two layers; the result has no exits
    config.task.name = "sums"
    config.task.options = {"steps": "mixed"}
    config.optim.full_lr = 1e-3
    config.eval.problems = 256
    return config


def _relearn():
    config = configs.finetune.get_config("tiny")
    config.steps = 50
    config.batch_size = 64
    config.lora.rank = configs.rl.get_config("tiny").lora.rank
    config.task.name = "sums"
    config.task.options = {"steps": 5}
    config.optim.lora_lr = 1e-3
    config.eval.problems = 256
    return config


def _measure(task):
    config = configs.eval.get_config("tiny")
    config.exits.layers = ()  # the model's own
    config.eval.policies = ("full", "sample", "shuffled", "fixed:matched", "threshold:0.5")
    if task != "sums":
        config.eval.measures = tuple(name for name in EVAL_MEASURES if name != "capacity")
    config.eval.heat_maps = 4
    return config


def _measure_full(*measures):
    config = _measure("sums")
    config.eval.policies = ("full",)
    config.eval.measured = "full"
    config.eval.measures = measures
    return config


def _compare():
    config = _measure("sums")
    config.eval.policies = ("full", "sample")
    config.eval.measures = ()
    config.eval.heat_maps = 0
    return config
