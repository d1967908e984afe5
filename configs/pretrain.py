"""Pretrains the shipped model's trunk on the text of `sums` and `word_problems`.

    python -m jexit.main --config=configs/pretrain.py --workdir=runs/pretrain
    python -m convert.to_hf --source=runs/pretrain --target=jexit/assets/tiny

Under an hour on two CPU cores. Greedy accuracy at full depth on 512 held-out sums with prescribed
steps of 2, 3, 4 and 5 operands: 100, 100, 100 and 99.8 %.

`--config.pretrain.exit_loss=0.3` adds deep supervision: cross-entropy at every exit's logit lens.
"""

from jexit.config import config_dict


def get_config(preset: str = "tiny"):
    config = config_dict("pretrain", preset)
    config.steps = 3000
    config.batch_size = 44  # rows, of some three texts each
    config.exits.layers = (1, 2, 3, 4, 6)
    config.optim.full_lr = 2e-3
    config.optim.b2 = 0.98
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100
    config.optim.final_fraction = 0.02
    config.optim.weight_decay = 0.02
    config.checkpoint.every = 250
    return config
