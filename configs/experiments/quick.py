"""Study A in under ten minutes on a CPU core: with and without a depth penalty.

    bash launch/sweep.sh --config=configs/experiments/quick.py \
        --eval=configs/experiments/measures.py:quick --into=runs/quick rl.depth_coef=0,2

From 89 % correct at 63 % of the depth (108 layers a problem) it ends at 100 % with λ = 0, at 79 %
of the depth (136 layers), and at 96 % with λ = 2, at 58 % (90 layers).
"""

import configs.rl


def get_config(preset: str = "tiny"):
    config = configs.rl.get_config(preset)
    config.steps = 60
    config.checkpoint.every = 20
    return config
