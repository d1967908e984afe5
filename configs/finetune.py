"""Fine-tunes a model on a task's reference completions, in its chat format.

    python -m jexit.main --config=configs/finetune.py

The default preset, `tiny`, is an example: it trains the shipped trunk on word problems, which the
trunk already knows (96 % of 256 validation problems before, 91 % after), in half a minute.

    python -m jexit.main --config=configs/finetune.py:smollm2-135m

Other presets train LoRA adapters for models/PRESET on GSM8K, and merge them into the trunk that
they write. `configs/sft.py` can calibrate it with `--config.model.path=runs/finetune-PRESET`.
`--config.lora.rank=0` trains all weights instead.
"""

from jexit.config import config_dict


def get_config(preset: str = "tiny"):
    config = config_dict("finetune", preset)
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 10
    config.optim.final_fraction = 0.1
    if config.preset == "tiny":
        config.steps = 60
        config.task.name = "word_problems"
        config.lora.rank = 0
        config.optim.full_lr = 3e-4
        config.eval.max_new_tokens = 64
        return config
    config.task.name = "gsm8k"
    config.steps = 500
    config.batch_size = 32
    config.model.remat = "block"
    config.finetune.max_new_tokens = 512
    config.eval.max_new_tokens = 512
    config.optim.lora_lr = 2e-4
    config.checkpoint.every = 100
    return config
