"""A quick version of Study A: with and without a depth penalty, in ten minutes on one CPU core.

    bash launch/sweep.sh --config=configs/experiments/quick.py \
        --eval=configs/experiments/evidence.py:compare --into=runs/quick rl.depth_coef=0,2

The model starts at 89 % correct and 63 % of the depth (108 layers per problem). It ends at 100 %
and 79 % (136 layers) with λ = 0, and at 96 % and 58 % (90 layers) with λ = 2.
"""

import configs.rl


def get_config(preset: str = "tiny"):
    config = configs.rl.get_config(preset)
    config.steps = 60
    config.checkpoint.every = 20
    return config
