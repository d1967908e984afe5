"""Study A's other trunk: pretrained with deep supervision, on sums alone.

    python -m jexit.main --config=configs/experiments/deep_trunk.py --workdir=runs/trunk-deep-begun
    python -m jexit.main --config=configs/experiments/deep_trunk.py --workdir=runs/trunk-deep \
        --config.pretrain.start=runs/trunk-deep-begun --config.seed=1 --config.steps=2200
    python -m jexit.main --config=configs/experiments/calibration.py --workdir=runs/deep \
        --config.model.path=runs/trunk-deep
    bash launch/sweep.sh --config=configs/experiments/pressure.py --into=runs/deep-sums --jobs=2 \
        --eval=configs/experiments/measures.py model.path=runs/deep rl.depth_coef=0.4,2 seed=0

A run of pretraining takes 50 minutes on one CPU core. After the first, steps of two operands are
correct at the last layer and those of three in 71 %; after the second, which begins anew with the
learning rate, those of four and five are learnt, too. Calibration takes seven minutes, a run of the
sweep a quarter of an hour; both penalties end at 99.6 % correct, at 34 and 25 % of the depth.
"""

import configs.pretrain


def get_config(preset: str = "tiny"):
    config = configs.pretrain.get_config(preset)
    config.steps = 2000
    config.pretrain.word_problems = 0.0
    config.pretrain.tom = 0.0
    config.pretrain.exit_loss = 0.3
    return config
