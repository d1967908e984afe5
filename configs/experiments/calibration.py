"""Study C: what a calibration is made of, before any reinforcement. On sums.

    bash launch/sweep.sh --config=configs/experiments/calibration.py \
        --eval=configs/experiments/measures.py:depth --into=runs/calibration --jobs=2 \
        sft.explore=0,0.1,0.25,0.5 sft.target=teacher,student seed=0

A run takes some seven minutes on a CPU core. From the predecessor of the shipped model: with the
teacher's targets it ends at 79 % of the depth and 94 to 98 % correct; with the student's at 56 %
(97 % correct) without exploration and at 49 % (91 %) with 0.5. Other settings one at a time, each
`--into` a directory of its own:
`sft.sharpness=1,10,200`, `sft.direction=teacher_student,jeffreys`, `exit_head.kind=linear`,
`sft.samples=4`; and `sft.exit_loss=sampled --config.sft.explore=0`, as sampled depths that are
partly explored would be no draws from the targets. What reinforcement makes of some:

    at=runs/calibration/sft.explore
    bash launch/sweep.sh --config=configs/experiments/pressure.py --into=runs/calibration-rl \
        --eval=configs/experiments/measures.py:depth --jobs=2 --config.rl.depth_coef=0.4 \
        "model.path=$at=0,sft.target=student,seed=0|$at=0.5,sft.target=student,seed=0|$at=0,sft.target=teacher,seed=0"

`:published` is on all tasks, for Study A to start from, and has what arXiv:2603.21376 has, but for
one draw of the depths where that has four, and this model's rates and steps; two hours on a core:

    python -m jexit.main --config=configs/experiments/calibration.py:published \
        --workdir=runs/published
"""

import configs.sft


def get_config(variant: str = "tiny"):
    if variant not in ("tiny", "published"):
        raise ValueError(f"there is no calibration {variant!r}; choose tiny or published")
    config = configs.sft.get_config("tiny")
    if variant == "published":
        config.sft.explore = 0.0
        config.sft.target = "teacher"
        config.sft.exit_loss = "sampled"
        config.sft.sharpness = 1.0
        return config
    config.steps = 200
    config.task.name = "sums"
    config.sft.pool = 2048
    return config
