"""Study E: fine-tunes, calibrates and reinforces SmolLM2-135M, a model with published weights.

    python -m convert.from_hf --source=HuggingFaceTB/SmolLM2-135M-Instruct --target=models/smollm2
    bash studies/smollm2.sh

The second command runs all stages below, and resumes where it was stopped: fine-tuning on the
task's reference completions, calibration on the model's own completions with three seeds, and for
each seed reinforcement with λ = 0 and two other penalties. The seeds are 1, 2 and 3: each has
training problems of its own, and fine-tuning has those of seed 0. `chain` measures what answers owe
to their chains of thought. The variants `published_calibrate` and `published_reinforce` have the
settings of arXiv:2603.21376, as far as they are known, and the same budgets. The heads' learning
rate in its calibration is ours, as the published one would move nothing in so few steps.
"""

import configs.eval
import configs.finetune
import configs.rl
import configs.sft
from jexit.config import CHAIN_MEASURES

PRESET = "smollm2-135m"
STAGES = {
    "finetune": configs.finetune,
    "calibrate": configs.sft,
    "reinforce": configs.rl,
    "measure": configs.eval,
    "chain": configs.eval,
}
PUBLISHED = {f"published_{stage}": stage for stage in ("calibrate", "reinforce")}


def get_config(variant: str = "measure"):
    if variant in PUBLISHED:
        return _published(get_config(PUBLISHED[variant]))
    if variant not in STAGES:
        stages = ", ".join((*STAGES, *PUBLISHED))
        raise ValueError(f"smollm2 has no stage {variant!r}; choose {stages}")
    config = STAGES[variant].get_config(PRESET)
    config.task.name = "word_problems"
    config.task.system = "Solve."  # the chat template's own is as long as a problem
    config.eval.max_new_tokens = 48
    config.eval.problems = 128  # before and after training
    config.optim.accumulate = 1
    config.exits.layers = (2, 4, 6, 9, 12, 15, 18, 21, 24, 27)
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")
    if variant == "finetune":
        config.model.path = "models/smollm2"
        config.exits.layers = ()
        config.steps = 60
        config.finetune.max_new_tokens = 64
        config.lora.rank = 0
        config.optim.full_lr = 2e-4
        config.checkpoint.every = 20
        return config
    config.rl.hazard_temperature = 0.3  # of every sampled depth, in all stages
    if variant == "calibrate":
        config.model.path = "runs/smollm2-trunk/model"
        # Adapters learn at 36 to 42 % of the layers (at 60: 31 to 39 %); heads leave later.
        config.sft.sharpness = 200.0
        config.sft.pool = 8192
        config.sft.generate_batch = 256
        config.sft.max_new_tokens = 48
        config.sft.samples = 1
        config.steps = 300
        config.batch_size = 16
        config.model.remat = "none"  # completions are short
        config.lora.dropout = 0.0
        config.optim.lora_lr = 4e-4  # at 1e-3, the KL to the teacher was twice as large
        config.optim.schedule = "cosine"
        config.optim.final_fraction = 0.1
        config.optim.warmup_steps = 10
        config.checkpoint.every = 100
        return config
    if variant == "reinforce":
        config.model.path = "runs/smollm2-sft/seed=1"
        config.model.remat = "none"
        config.steps = 48
        config.batch_size = 16
        config.rl.rollouts = 6
        config.rl.max_new_tokens = 48
        config.rl.kl_coef = 0.01
        config.rl.kl_loss = "forward"  # on the model's own samples: repairs what exits cost
        # With 30, and lora_lr 1e-4, the KL to the teacher did not fall in 96 updates.
        config.rl.kl_loss_coef = 3.0
        config.rl.causal_depth = True
        config.rl.depth_norm = "total"
        config.rl.length_ref = 19.0  # tokens that the fine-tuned model writes
        config.rl.depth_coef = 4.0
        config.rl.accuracy_floor = 0.85  # of the full depth's, under which λ is withheld
        config.rl.warmup_steps = 10
        config.optim.lora_lr = 4e-4
        config.optim.schedule = "cosine"  # at a constant rate, accuracy fell after 24 updates
        config.optim.final_fraction = 0.1
        config.optim.exit_lr = 2e-3
        config.optim.exit_bias = 15.0  # with 1 the penalty moved nothing in 24 updates
        config.optim.exit_hidden = 0.0
        config.optim.warmup_steps = 5
        config.checkpoint.every = 10
        return config
    config.exits.layers = ()  # the model's own
    if variant == "chain":
        config.eval.problems = 128
        config.eval.policies = ("full", "threshold:0.5")
        config.eval.measured = "threshold:0.5"
        config.eval.measures = ("serial_depth", "planning", *CHAIN_MEASURES)
        return config
    config.eval.problems = 512
    config.eval.policies = (
        *("full", "sample", "threshold:0.5", "threshold:0.65", "threshold:0.8"),
        *("shuffled", "fixed:matched"),
    )
    config.eval.measures = ("exits",)
    config.eval.heat_maps = 4
    return config


def _published(config):
    config.exits.layers = (5, 10, 15, 20, 25)
    config.exits.continuation = "frozen"
    config.rl.hazard_temperature = 1.0
    config.lora.rank = 8
    config.lora.alpha = 16.0
    config.lora.targets = ("q", "k", "v", "o")
    config.lora.dropout = 0.05
    config.optim.lora_lr = 1e-4
    if config.command == "sft":
        config.exit_head.detached = False
        config.sft.lens_steps = 0
        config.sft.target = "teacher"
        config.sft.sharpness = 1.0
        config.sft.exit_loss = "sampled"
        config.sft.exit_coef = 1.0
        config.sft.direction = "student_teacher"
        config.batch_size //= 4  # each sequence has four students
        config.sft.samples = 4
        config.optim.exit_lr = 1e-3
        return config
    config.model.path = "runs/smollm2-published-sft/seed=1"
    config.task.reward_none = -1.0
    config.rl.depth_coef = 1.0  # published: 0 to 1.5
    config.rl.depth_norm = "mean"
    config.rl.kl_coef = 0.1
    config.rl.kl_loss_coef = 0.0
    config.rl.causal_depth = False
    config.rl.accuracy_floor = 0.0
    config.rl.floor_of = "absolute"
    config.rl.warmup_steps = 0
    config.optim.exit_lr = 1e-5
    config.optim.exit_bias = config.optim.exit_hidden = 1.0
    return config
