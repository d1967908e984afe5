"""Study B: does reasoning move into the chain of thought when layers and text both cost?

    bash launch/sweep.sh --config=configs/experiments/page.py \
        --eval=configs/experiments/measures.py --into=runs/page --jobs=2 \
        rl.depth_coef=0,0.5,1,2,4 seed=0,1

Depth and text compete: a long completion of small steps is shallow, a short one of large steps is
deep. Both penalties come in over 40 updates and are withheld while fewer than 90 % of the answers
are correct, since a length penalty collapses the text of a model that is often wrong.

A larger length penalty, under which steps keep their size at any depth penalty:

    bash launch/sweep.sh --config=configs/experiments/page.py \
        --eval=configs/experiments/measures.py --into=runs/page-dear_text --jobs=2 \
        --config.rl.length_coef=0.5 rl.depth_coef=0,2 seed=0,1

A run takes a quarter of an hour on a CPU core. From the predecessor of the shipped model, all end
at 99.6 % correct or more; from λ = 0 to λ = 4 the depth falls from 63 to 37 % (60 to 48 layers a
problem), the additions that are written out rise from 55 to 78 % (87 % before any of it), and
prescribed steps of three are taken by 32 % of the completions instead of all.
"""

import configs.rl


def get_config(preset: str = "tiny"):
    config = configs.rl.get_config(preset)
    config.rl.length_coef = 0.2  # at 0.5 steps do not shrink at a depth penalty of 2
    config.rl.length_ref = 22.0  # tokens of the initial checkpoint's completions, about
    config.rl.warmup_steps = 40
    config.rl.accuracy_floor = 0.9
    config.checkpoint.every = 50
    return config
