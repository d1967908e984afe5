"""How the studies measure a trained model: accuracy, depth, controls and externalisation.

`:word_problems` leaves out the prescribed steps, which that task has not; `:depth` the measures of
the chain; `:quick` everything but the policies, on fewer problems. The initial checkpoint, on many
problems and on those of the studies, some minutes each on a CPU core (the predecessor of the
shipped model: sums 91 % correct at 42 % of the depth, word problems 80 at 26, stories 67 at 46):

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
