"""Pretrains a model without adapters, such as the shipped one, on the texts of tasks."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import numpy as np
from flax import nnx

from jexit.config import Config, check_exits
from jexit.data.loader import prepared, text_batch
from jexit.data.tokenizer import Tokenizer
from jexit.dist import host_rows, is_primary, place_parameters, place_rows, waiting
from jexit.errors import UserError
from jexit.io.model_dir import load, save_model
from jexit.io.model_source import find_model
from jexit.io.workdir import start_run
from jexit.loops.flops import ModelFlops, PassSize
from jexit.loops.pictures import draw
from jexit.loops.setup import execution_of
from jexit.loops.trainer import Trainer
from jexit.model.transformer import Transformer
from jexit.presets import Architecture
from jexit.steps.optim import make_optimizer, schedule
from jexit.steps.pretrain import PretrainBatch, make_pretrain_step
from jexit.steps.state import new_state, parameter_labels, split_model, step_key
from jexit.tasks import Task, make_task

# Groups of target tokens by name. A group contains the tokens that follow this separator in texts
# of this task: the results of steps with 2 to 5 operands, and the answers of stories.
GROUPS = {
    **{f"step_{n}": ("sums", "+" * (n - 1)) for n in range(2, 6)},
    "story": ("tom", "####"),
}
PROBED = 20  # steps whose batches are made as a check before the run writes anything


def new_model(config: Config, tokenizer: Tokenizer) -> Transformer:
    """Returns a randomly initialised Qwen3-style model with the sizes in `config.pretrain`.

    It has the exits that `config` describes, but no adapters. The vocabulary is the tokenizer's.
    """
    p = config.pretrain
    arch = Architecture(
        family="qwen3",
        vocab_size=tokenizer.vocab_size,
        width=p.width,
        layers=p.layers,
        query_heads=p.query_heads,
        kv_heads=p.kv_heads,
        head_dim=p.head_dim,
        mlp_width=p.mlp_width,
        rope_theta=p.rope_theta,
        rms_norm_eps=1e-6,
        tied=True,
        max_positions=1024,
    )
    return Transformer(
        arch,
        exit_layers=check_exits(config.exits.layers, arch.layers),
        exit_head=config.exit_settings,
        execution=execution_of(config),
        rngs=nnx.Rngs(config.seed),
    )


def first_model(config: Config, tokenizer: Tokenizer) -> Transformer:
    """Loads the model in the directory `config.pretrain.start`, or makes a new one if it is "".

    Raises UserError if the loaded model differs in size from the configured one, or has adapters.
    """
    fresh = new_model(config, tokenizer)
    if not config.pretrain.start:
        return fresh
    model, _ = load(
        config.pretrain.start,
        dtype="float32",
        exit_layers=fresh.exit_layers,
        exit_head=fresh.exit_head,
        execution=fresh.execution,
        seed=config.seed,
    )
    names = [field.name for field in dataclasses.fields(fresh.arch)]
    ours, theirs = fresh.arch, model.arch
    other = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
    if model.lora is not None or other:
        what = f"{other[0]}={getattr(theirs, other[0])}" if other else "adapters"
        rule = f"{other[0]}={getattr(ours, other[0])}" if other else "a model without adapters"
        raise UserError(
            f"config.pretrain.start={config.pretrain.start} contains a model with {what}, but the "
            f"config requires {rule}; start from a model without adapters that has the sizes of "
            "config.pretrain and the tokenizer of config.model.path"
        )
    return model


def mixture(config: Config) -> list[tuple[Task, float]]:
    """Returns (task, fraction of the training texts that the task provides) for each task.

    `sums` and `tom` use prompts of every kind (`steps="mixed"`).
    """
    p = config.pretrain
    sums = max(0.0, 1.0 - p.word_problems - p.tom)  # rounding could make it slightly negative
    tasks = [
        (make_task("sums", steps="mixed"), sums),
        (make_task("word_problems"), p.word_problems),
        (make_task("tom", steps="mixed"), p.tom),
    ]
    return [(task, share) for task, share in tasks if share > 0]


def pretrain(config: Config, workdir: pathlib.Path) -> None:
    """Pretrains for `config.steps` steps; writes the model, without exits, to `WORKDIR/model`."""
    tokenizer = Tokenizer.load(find_model(config.model.path))
    tokenizer.system, tokenizer.thinking = config.task.system, config.task.thinking
    model = first_model(config, tokenizer)
    tasks = mixture(config)
    names = [task.name for task, _ in tasks]
    separators = {name: tokenizer.encode(text) for name, (_, text) in GROUPS.items()}
    assert all(len(ids) == 1 for ids in separators.values()), "separators must be single tokens"

    here = host_rows(config.batch_size)

    def batch_of(step: int) -> tuple[PretrainBatch, float]:
        """Returns (this host's rows of the batch of step `step`, FLOPs of the whole batch)."""
        text = text_batch(
            tasks,
            tokenizer,
            seed=config.seed,
            step=step,
            batch_size=config.batch_size,
            length=config.pretrain.length,
        )
        previous_BT = np.roll(text.tokens_BT, 1, axis=1)
        group_BT = np.zeros_like(text.tokens_BT)
        for number, (name, (task, _)) in enumerate(GROUPS.items(), start=1):
            if task in names:
                follows_BT = (previous_BT == separators[name]) & (text.loss_mask_BT > 0)
                group_BT[follows_BT & (text.task_BT == names.index(task))] = number
        batch = PretrainBatch(
            text.tokens_BT, text.loss_mask_BT, text.segment_BT, text.position_BT, group_BT
        )
        flops = counted.pretrain_step(
            PassSize.of(text.lengths_N), exit_loss=config.pretrain.exit_loss > 0
        )
        return jax.tree.map(lambda rows_BT: rows_BT[here.index_B], batch), flops

    counted = ModelFlops.of(model, full=True)
    for step in range(min(PROBED, config.steps)):  # raises UserError if a text exceeds the length
        batch_of(step)
    start_run(workdir, config)
    split = split_model(model, full=True, keep_teacher=False)
    split = split._replace(trainable=place_parameters(split.trainable))
    optimizer = make_optimizer(config.optim, config.steps, parameter_labels(model, full=True))
    step_fn = make_pretrain_step(
        split,
        optimizer,
        exit_loss=config.pretrain.exit_loss,
        groups=tuple(GROUPS),
        micro_batches=config.optim.accumulate,
    )
    shown = {"loss": "loss", **{f"p_correct/{name}": name for name in GROUPS}}
    trainer = Trainer(config, workdir, "pretrain", shown)
    state = trainer.restore(new_state(split.trainable, optimizer))
    rate = schedule(config.optim, config.optim.full_lr, config.steps)

    batches = prepared(batch_of, int(state.step), config.steps)

    def one_step(state, step):
        batch, flops = next(batches)
        batch = place_rows(batch, here)
        with waiting(f"step {step + 1}"):
            state, metrics = step_fn(state, batch, step_key(config.seed, step))
        return state, metrics | {"lr": rate(step), "model_flops": flops}

    state = trainer.chosen(trainer.run(state, one_step))
    trainer.close()
    # The exit heads are untrained, so they are not written.
    student = split.student(state.trainable)
    save_model(workdir / "model", student, tokenizer, with_exits=False, overwrite=True)
    if is_primary():
        print(f"Wrote {workdir / 'model'}")
        print(f"Drew {draw(workdir)}")
