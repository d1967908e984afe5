"""Calibrates the exits of a model by self-distillation.

    python -m jexit.main --config=configs/sft.py
    python -m convert.to_hf --source=runs/sft-tiny --target=jexit/assets/tiny-calibrated \
        --adapter=peft --base=jexit/assets/tiny

The default preset, `tiny`, calibrates the shipped trunk on `sums`, `word_problems` and `tom`, in 20
minutes on two CPU cores. With sampled exits, the model then has an accuracy of 67 % at 0.45 L (45 %
of all layers) over all kinds of prompt. On 256 test problems of each task, accuracy (and layers per
problem) at full depth and with sampled exits: sums 94 % (171), and 87 % at 0.63 L (108); word
problems 73 % (151), and 58 % at 0.29 L (44); stories 65 % (116), and 59 % at 0.45 L (48). Training
at explored depths costs accuracy at full depth: the trunk has 95 % on word problems.

    python -m jexit.main --config=configs/sft.py:qwen2.5-0.5b

Other presets calibrate models/PRESET, which `convert.from_hf` writes, on GSM8K. qwen2.5-0.5b has
been run on CPU for 24 steps with short completions (docs/models.md lists the options); no whole run
has been timed.
"""

from jexit.config import config_dict


def get_config(preset: str = "tiny"):
    config = config_dict("sft", preset)
    config.sft.target = "student"
    config.sft.exit_loss = "expected"
    if config.preset == "tiny":
        config.steps = 900
        config.batch_size = 96
        config.task.name = "blend"
        config.sft.explore = 0.5
        config.sft.samples = 1
        config.sft.sharpness = 60.0  # careful heads: RL then has correct answers to learn from
        config.sft.pool = 8192
        config.sft.generate_batch = 256
        config.sft.max_new_tokens = 56
        config.optim.lora_lr = 5e-3
        config.optim.exit_lr = 5e-3
        config.optim.schedule = "cosine"
        config.optim.warmup_steps = 20
        config.optim.final_fraction = 0.1
        config.eval.problems = 256
        config.eval.max_new_tokens = 56
        return config
    config.task.name = "gsm8k"
    config.steps = 500
    config.batch_size = 16
    config.optim.accumulate = 4
    config.model.remat = "block"
    config.sft.max_new_tokens = 512
    config.sft.temperature = 0.7 if config.preset.startswith("qwen3") else 1.0
    # Adapters learn under depths at the edge of what their exits can do. None is explored: on
    # SmolLM2-135M, exploring 5 % of them made the KL to the teacher three to six times as large, at
    # tokens that no head lets leave. The gradient of this loss is bounded; that of KL(student ‖
    # teacher) grows with the teacher's certainty, and the continuation amplifies it.
    config.sft.direction = "teacher_student"
    config.sft.exit_coef = 0.02  # of the norm that clipping sees; the heads are detached
    config.sft.lens_steps = 3000  # heads are calibrated last, on the trunk as it then is
    config.sft.sharpness = 10.0
    config.rl.hazard_temperature = 0.5
    config.optim.exit_lr = 3e-3
    config.optim.warmup_steps = 20
    config.checkpoint.every = 250
    return config
