"""Study C: how the settings of calibration affect the model before reinforcement, on sums.

    bash launch/sweep.sh --config=configs/experiments/calibration.py \
        --eval=configs/experiments/measures.py:depth --into=runs/calibration --jobs=2 \
        sft.explore=0,0.1,0.25,0.5 sft.target=teacher,student seed=0

A run takes about seven minutes on one CPU core. Results with the predecessor of the shipped model:
the teacher's targets lead to 79 % of the depth and 94 to 98 % correct answers, the student's
targets to 56 % (97 % correct) without exploration and 49 % (91 % correct) with `sft.explore=0.5`.
Further settings are varied one at a time, each with its own directory for `--into`:
`sft.sharpness=1,10,200`, `sft.direction=teacher_student,jeffreys`, `exit_head.kind=linear`,
`sft.samples=4`, and `sft.exit_loss=sampled --config.sft.explore=0` (the sampled loss does not allow
exploration). Reinforcement of some of these models:

    at=runs/calibration/sft.explore
    bash launch/sweep.sh --config=configs/experiments/pressure.py --into=runs/calibration-rl \
        --eval=configs/experiments/measures.py:depth --jobs=2 --config.rl.depth_coef=0.4 \
        "model.path=$at=0,sft.target=student,seed=0|$at=0.5,sft.target=student,seed=0|$at=0,sft.target=teacher,seed=0"

The variant `:published`, from which Study A also starts, calibrates on all tasks in two hours as in
arXiv:2603.21376, except for the learning rates, the steps, and one draw of depths instead of four:

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
