"""Evaluates the models of the studies: accuracy, depth, controls and all further measures.

The variant `:word_problems` omits prescribed steps, which that task does not have, `:depth` omits
the measures of the chain of thought, and `:quick` omits all measures, on fewer problems. These
commands evaluate the initial checkpoints, in some minutes each on one CPU core:

    bash launch/sweep.sh --config=configs/experiments/measures.py:quick --into=runs/starts \
        --jobs=2 task.name=sums,word_problems,tom --config.eval.problems=1024
    bash launch/sweep.sh --config=configs/experiments/measures.py --into=runs/start-sums \
        task.name=sums
    bash launch/sweep.sh --config=configs/experiments/measures.py --into=runs/start-tom \
        task.name=tom
    bash launch/sweep.sh --config=configs/experiments/measures.py:word_problems \
        --into=runs/start-word_problems task.name=word_problems
    bash launch/sweep.sh --config=configs/experiments/measures.py:quick --into=runs/starts-others \
        --config.task.name=sums --config.eval.problems=256 model.path=runs/published,runs/deep
"""

import configs.eval
from jexit.config import EVAL_MEASURES

LEFT_OUT = {
    "tiny": (),
    "word_problems": ("capacity",),
    "depth": tuple(name for name in EVAL_MEASURES if name not in ("exits", "hazards", "capacity")),
    "quick": EVAL_MEASURES,
}


def get_config(variant: str = "tiny"):
    if variant not in LEFT_OUT:
        raise ValueError(f"measures of {variant!r} are not known; choose {', '.join(LEFT_OUT)}")
    config = configs.eval.get_config("tiny")
    config.eval.policies = ("full", "sample", "shuffled", "fixed:matched")
    config.eval.measures = tuple(
        name for name in config.eval.measures if name not in LEFT_OUT[variant]
    )
    config.eval.heat_maps = 4
    if variant == "quick":
        config.eval.problems = 128
    return config
