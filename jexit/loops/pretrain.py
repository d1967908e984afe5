"""Pretraining of the shipped model's trunk on the tasks' own text."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
from flax import nnx

from jexit.config import Config, check_exits
from jexit.data.loader import prepared, text_batch
from jexit.data.tokenizer import Tokenizer
from jexit.dist import host_rows, is_primary, place_parameters, place_rows, waiting
from jexit.io.model_dir import save_model
from jexit.io.workdir import start_run
from jexit.loops.flops import ModelFlops
from jexit.loops.pictures import draw
from jexit.loops.setup import execution_of, head_settings
from jexit.loops.trainer import Trainer
from jexit.model.transformer import Transformer
from jexit.presets import Architecture
from jexit.steps.optim import make_optimizer, schedule
from jexit.steps.pretrain import PretrainBatch, make_pretrain_step
from jexit.steps.state import new_state, parameter_labels, split_model, step_key
from jexit.tasks import Task, make_task

# A target that follows one of these separators is the result of a step of that many operands.
RESULT_GROUPS = {"step_2": "+", "step_3": "++", "step_4": "+++", "step_5": "++++"}


def new_model(config: Config, tokenizer: Tokenizer) -> Transformer:
    """A randomly initialised Qwen3-style trunk of the config's size."""
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
    exits = check_exits(config.exits.layers, arch.layers)
    return Transformer(
        arch,
        exit_layers=exits,
        exit_head=head_settings(config),
        execution=execution_of(config),
        rngs=nnx.Rngs(config.seed),
    )


@dataclasses.dataclass(frozen=True)
class Text:
    """Rows of every step that are padded to one length: tasks that write them, with weights."""

    mixture: list[tuple[Task, float]]
    rows: int
    length: int


def texts(config: Config) -> list[Text]:
    """What a step's rows hold: short texts (sums, word problems), and stories, which are longer.

    The rows are divided as the shares say, in multiples of what micro-batches and data shards take.
    Raises ValueError when a share comes to less than one of these.
    """
    p, mesh = config.pretrain, config.mesh
    unit = config.optim.accumulate * mesh.data * mesh.fsdp
    stories = round(p.tom * config.batch_size / unit) * unit
    short = max(0.0, 1.0 - p.word_problems - p.tom)  # rounding must not leave it a hair below zero
    mixture = [(make_task("sums", steps="mixed"), short)]
    mixture.append((make_task("word_problems"), p.word_problems))
    parts = [
        Text([pair for pair in mixture if pair[1] > 0], config.batch_size - stories, p.length),
        Text([(make_task("tom", steps="mixed"), 1.0)], stories, p.tom_length),
    ]
    for part, share in zip(parts, (1.0 - p.tom, p.tom), strict=True):
        if share > 1e-9 and part.rows == 0:
            raise ValueError(
                f"a share of {share:g} of config.batch_size {config.batch_size} is less than the "
                f"{unit} rows that micro-batches and data shards take; raise config.batch_size"
            )
    return [part for part in parts if part.rows and part.mixture]


def pretrain(config: Config, workdir: pathlib.Path) -> None:
    """Trains for `config.steps` and writes the model directory `WORKDIR/model`."""
    tokenizer = Tokenizer.load(config.model.path)
    tokenizer.thinking = config.task.thinking
    model = new_model(config, tokenizer)
    parts = texts(config)
    separators = [tokenizer.encode(text) for text in RESULT_GROUPS.values()]
    assert all(len(ids) == 1 for ids in separators), "separators must be single tokens"

    here = [host_rows(part.rows) for part in parts]

    def batch_of(step: int) -> tuple[PretrainBatch, ...]:
        batches = []
        for part, rows in zip(parts, here, strict=True):
            batch = text_batch(
                part.mixture,
                tokenizer,
                seed=config.seed,
                step=step,
                batch_size=part.rows,
                length=part.length,
                prompt_weight=config.pretrain.prompt_loss,
                rows=rows.index_B,
            )
            previous_BT = np.roll(batch.tokens_BT, 1, axis=1)
            group_BT = np.zeros_like(batch.tokens_BT)
            for number, (separator,) in enumerate(separators, start=1):
                group_BT[(previous_BT == separator) & (batch.loss_mask_BT > 0)] = number
            batches.append(PretrainBatch(batch.tokens_BT, batch.loss_mask_BT, group_BT))
        return tuple(batches)

    batch_of(0)  # a length that is too short stops the run before it writes anything
    start_run(workdir, config.to_dict())
    split = split_model(model, full=True, keep_teacher=False)
    split = split._replace(trainable=place_parameters(split.trainable))
    optimizer = make_optimizer(config.optim, config.steps, parameter_labels(model, full=True))
    step_fn = make_pretrain_step(
        split,
        optimizer,
        exit_loss=config.pretrain.exit_loss,
        groups=tuple(RESULT_GROUPS),
        micro_batches=config.optim.accumulate,
    )
    trainer = Trainer(
        config,
        workdir,
        "pretrain",
        {"loss": "loss", **{f"p_right/{name}": name for name in RESULT_GROUPS}},
    )
    state = trainer.restore(new_state(split.trainable, optimizer))
    counted = ModelFlops.of(model, full=True)
    flops = sum(
        counted.pretrain_step(part.rows, part.length - 1, exit_loss=config.pretrain.exit_loss > 0)
        for part in parts
    )
    rate = schedule(config.optim, config.optim.full_lr, config.steps)

    batches = prepared(batch_of, int(state.step), config.steps)

    def one_step(state, step):
        batch = map(place_rows, next(batches), here)
        with waiting(f"step {step + 1}"):
            state, metrics = step_fn(state, tuple(batch), step_key(config.seed, step))
        return state, metrics | {"lr": rate(step), "model_flops": flops}

    state = trainer.run(state, one_step)
    if config.checkpoint.final == "best":
        state = trainer.best(state)
    trainer.close()
    # The heads have learnt nothing yet: what is written is a plain trunk.
    student = split.student(state.trainable)
    save_model(workdir / "model", student, tokenizer, with_exits=False, overwrite=True)
    if is_primary():
        print(f"Wrote {workdir / 'model'}")
        print(f"Drew {draw(workdir)}")
