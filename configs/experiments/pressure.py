"""Study A: accuracy and depth as the depth penalty grows, and which penalty to choose.

    bash launch/sweep.sh --config=configs/experiments/pressure.py \
        --eval=configs/experiments/measures.py --into=runs/pressure-sums --jobs=2 \
        rl.depth_coef=0,0.1,0.2,0.4,0.8,2 seed=0,1

A run takes a quarter of an hour on a CPU core. From the predecessor of the shipped model, 89 %
correct at 42 % of the depth, all penalties end within a problem of 256 of 100 %: λ = 0 at 59 to
70 %, 0.4 at 45 to 48, 2 at 35 to 38.

Other tasks, of which one cannot prescribe steps:

    bash launch/sweep.sh --config=configs/experiments/pressure.py --config.task.name=word_problems \
        --eval=configs/experiments/measures.py:word_problems --into=runs/pressure-word_problems \
        --jobs=2 rl.depth_coef=0,0.2,0.8 seed=0,1
    bash launch/sweep.sh --config=configs/experiments/pressure.py --config.task.name=tom \
        --config.steps=120 --eval=configs/experiments/measures.py --into=runs/pressure-tom \
        --jobs=2 rl.depth_coef=0,0.2,0.8 seed=0,1

Word problems end at 91 to 96 % correct, at 54 and 74 % of the depth for λ = 0, 43 % for 0.2 and
32 % for 0.8; stories at 61 to 70 %, at 48 to 54, 35 to 39 and 29 to 32 % of the depth.

Instead of a grid of penalties, one that dual ascent raises while accuracy keeps over a floor, up to
2 on sums and word problems, up to 0.5 on stories, in half an hour a run:

    bash launch/sweep.sh --config=configs/experiments/pressure.py \
        --eval=configs/experiments/measures.py --into=runs/ascent-sums --jobs=2 \
        rl.accuracy_floor=0.95 seed=0,1 --config.rl.dual_ascent=True
    bash launch/sweep.sh --config=configs/experiments/pressure.py --config.task.name=word_problems \
        --eval=configs/experiments/measures.py:word_problems --into=runs/ascent-word_problems \
        --jobs=2 rl.accuracy_floor=0.9 seed=0,1 --config.rl.dual_ascent=True
    bash launch/sweep.sh --config=configs/experiments/pressure.py \
        --eval=configs/experiments/measures.py --into=runs/ascent-tom --jobs=2 \
        rl.accuracy_floor=0.7 seed=0,1 --config.rl.dual_ascent=True --config.rl.depth_coef=0.5 \
        --config.steps=300 --config.task.name=tom --eval.eval.problems=1024

From a checkpoint that was calibrated in the published way (configs/experiments/calibration.py):

    bash launch/sweep.sh --config=configs/experiments/pressure.py \
        --eval=configs/experiments/measures.py --into=runs/published-sums --jobs=2 \
        --config.model.path=runs/published rl.depth_coef=0.4,2 seed=0,1

From a trunk that was pretrained with deep supervision: configs/experiments/deep_trunk.py.
"""

import configs.rl


def get_config(preset: str = "tiny"):
    config = configs.rl.get_config(preset)
    config.checkpoint.every = 50
    return config
