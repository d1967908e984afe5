"""Study A with another trunk, which is pretrained with deep supervision and only on sums.

    python -m jexit.main --config=configs/experiments/deep_trunk.py --workdir=runs/trunk-deep-begun
    python -m jexit.main --config=configs/experiments/deep_trunk.py --workdir=runs/trunk-deep \
        --config.pretrain.start=runs/trunk-deep-begun --config.seed=1 --config.steps=2200
    python -m jexit.main --config=configs/experiments/calibration.py --workdir=runs/deep \
        --config.model.path=runs/trunk-deep
    bash launch/sweep.sh --config=configs/experiments/pressure.py --into=runs/deep-sums --jobs=2 \
        --eval=configs/experiments/measures.py model.path=runs/deep rl.depth_coef=0.4,2 seed=0

Each pretraining run takes 50 minutes on one CPU core. After the first, the model is correct at full
depth with steps of two operands, and in 71 % of the problems with steps of three. The second, which
restarts the learning-rate schedule, adds steps of four and five. Calibration takes seven minutes,
and each run of the sweep 15 minutes. Both end at 99.6 % correct, at 34 and 25 % of the depth.
"""

import configs.pretrain


def get_config(preset: str = "tiny"):
    config = configs.pretrain.get_config(preset)
    config.steps = 2000
    config.pretrain.word_problems = 0.0
    config.pretrain.tom = 0.0
    config.pretrain.exit_loss = 0.3
    return config
