"""Study D: a real 0.5B model on GSM8K, calibrated and reinforced as far as CPUs go.

    hf download Qwen/Qwen2.5-Coder-0.5B-Instruct
    python -m convert.from_hf --source=Qwen/Qwen2.5-Coder-0.5B-Instruct --target=models/small
    bash launch/sweep.sh --config=configs/experiments/real.py:calibrate --into=runs/real-sft
    bash launch/sweep.sh --config=configs/experiments/real.py --into=runs/real-base \
        model.path=models/small "--config.eval.policies=('full',)"
    bash launch/sweep.sh --config=configs/experiments/real.py --into=runs/real \
        model.path=runs/real-sft/run
    bash launch/sweep.sh --config=configs/experiments/real.py:reinforce --into=runs/real-rl \
        model.path=runs/real-sft/run

(The tables of docs/results.md call the calibrated one runs/real-sft.) GSM8K comes as README.md
says. docs/results.md tells of a copy of these weights that had been rounded to 4 to 8 bits; the
weights themselves have not been measured.

Exits lie late, before layers 16, 18, 20 and 22 of 24: on its own completions this model's logit
lens is 10 nats and more from the end up to layer 15, 4.6 at layer 18, 2.4 at 20 and 0.5 at 22. With
exits before 5, 10, 15 and 20, half of the depths drawn uniformly, sharpness 20 and a learning rate
of 1e-3, 48 steps left 5 % of 60 problems right with all layers, where 20 % were before; with these
exits and settings but for a sharpness of 5, 48 steps left 13 %, and 3 % under sampled exits at 85 %
of the depth. With those below, 64 steps left 13 % with all layers, and 7 % under sampled exits at
90 % of the depth.

On one core a step of calibration takes 16 to 170 s, by how long its completions are and whether
their shape is new (one took eleven minutes); a policy's 60 problems take six minutes, an update two
to five. A GPU has `configs/{sft,rl,eval}.py:qwen2.5-0.5b`, with the budgets of a real run.
"""

import configs.eval
import configs.rl
import configs.sft

PRESET = "qwen2.5-0.5b"  # the same shapes
STAGES = {"calibrate": configs.sft, "reinforce": configs.rl, "measure": configs.eval}


def get_config(variant: str = "measure"):
    if variant not in STAGES:
        raise ValueError(f"real has no stage {variant!r}; choose {', '.join(STAGES)}")
    config = STAGES[variant].get_config(PRESET)
    config.exits.layers = (16, 18, 20, 22)
    config.exits.continuation = "frozen"
    config.eval.problems = 8  # before and after training; what is measured has 60
    if variant == "calibrate":
        config.model.path = "models/small"
        config.steps = 64
        config.batch_size = 4
        config.optim.accumulate = 1
        config.optim.lora_lr = 3e-4
        config.optim.exit_lr = 2e-3
        config.optim.schedule = "cosine"
        config.optim.final_fraction = 0.1
        config.optim.warmup_steps = 4
        config.sft.explore = 0.1
        config.sft.samples = 1
        config.sft.pool = 48
        config.sft.generate_batch = 48
        config.sft.max_new_tokens = 256
        config.sft.sharpness = 40.0
        config.checkpoint.every = 8
        return config
    if variant == "reinforce":
        config.model.path = "runs/real-sft/run"
        config.steps = 12
        config.batch_size = 4
        config.rl.rollouts = 4
        config.rl.max_new_tokens = 256
        config.rl.depth_coef = 0.5
        config.rl.warmup_steps = 4
        config.optim.accumulate = 4
        config.checkpoint.every = 2
        return config
    config.model.path = "models/small"
    config.eval.problems = 60
    config.eval.policies = ("full", "sample", "shuffled", "fixed:matched")
    config.eval.measures = ()
    config.eval.heat_maps = 4
    return config
