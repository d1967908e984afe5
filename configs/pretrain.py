"""Pretrains the shipped model's trunk on the text of `sums`, `word_problems` and `tom`.

    python -m jexit.main --config=configs/pretrain.py --workdir=runs/pretrain
    python -m convert.to_hf --source=runs/pretrain --target=jexit/assets/tiny

This takes 75 minutes on two CPU cores. Greedy accuracy at full depth on 256 test problems: sums
100, 100, 99 and 93 % in prescribed steps of 2, 3, 4 and 5 operands, and 82 % at once; word problems
95 %; stories 76 % in full, 70 % in short and 65 % at once, compared with 39 % for guessing.

`--config.pretrain.exit_loss=0.3` adds deep supervision: a cross-entropy loss at every exit.
"""

from jexit.config import config_dict


def get_config(preset: str = "tiny"):
    config = config_dict("pretrain", preset)
    config.steps = 5400
    config.batch_size = 32  # rows, of some three texts each
    config.model.scan_unroll = 8  # no loop over layers: a fifth faster on CPUs
    config.pretrain.word_problems = 0.1
    config.pretrain.tom = 0.45
    config.exits.layers = (1, 2, 3, 4, 6)
    config.optim.full_lr = 2e-3
    config.optim.b2 = 0.98
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100
    config.optim.final_fraction = 0.02
    config.optim.weight_decay = 0.02
    config.checkpoint.every = 250
    return config
