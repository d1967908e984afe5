"""Study B: does reasoning move into the chain of thought if layers and tokens are both penalised?

    bash launch/sweep.sh --config=configs/experiments/page.py \
        --eval=configs/experiments/measures.py --into=runs/page --jobs=2 \
        rl.depth_coef=0,0.5,1,2,4 seed=0,1

The penalties compete: a long completion in small steps needs few layers per token, and a short one
in large steps needs many. Both penalties rise over 40 updates, and are withheld at less than 90 %
correct answers, because a length penalty would shrink the text of a model that is often wrong.

With a larger length penalty, steps keep their size at any depth penalty:

    bash launch/sweep.sh --config=configs/experiments/page.py \
        --eval=configs/experiments/measures.py --into=runs/page-dear_text --jobs=2 \
        --config.rl.length_coef=0.5 rl.depth_coef=0,2 seed=0,1

A run takes 15 minutes on one CPU core. With the predecessor of the shipped model, all runs end at
99.6 % correct or more. From λ = 0 to λ = 4, the depth falls from 63 to 37 % (60 to 48 layers per
problem), the fraction of additions that are written out rises from 55 to 78 % (87 % before
training), and only 32 % of the completions instead of all still obey a prescribed step size of
three.
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
