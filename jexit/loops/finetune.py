"""Fine-tuning on reference completions: what makes a model correct often enough to reinforce."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from jexit.config import Config
from jexit.data.loader import encode_references, prepared
from jexit.dist import HostRows, data_shards, host_rows, place_rows, waiting
from jexit.errors import UserError
from jexit.loops.flops import Work
from jexit.loops.packing import Lengths, Packed, PackedShapes
from jexit.loops.stage import Stage
from jexit.loops.trainer import Trainer
from jexit.model.attention import choose_attention
from jexit.steps.completions import Completions, pack_completions
from jexit.steps.finetune import make_finetune_step
from jexit.steps.state import TrainState, new_state, step_key


def finetune(config: Config, workdir: pathlib.Path) -> None:
    """Trains for `config.steps` and writes `WORKDIR/model`: a trunk, with its adapters merged."""
    stage = Stage.open(config, workdir, updates=config.steps)
    before = stage.measure_before()
    micro_batches = config.optim.accumulate
    step_fn = make_finetune_step(stage.split, stage.optimizer, micro_batches=micro_batches)
    attention = config.model.attention
    shapes = PackedShapes(
        data_shards(),
        micro_batches,
        stage.flops.arch.width,
        config.task.max_prompt_tokens + config.finetune.max_new_tokens,
        lambda length: choose_attention(attention, length) != "splash",
    )
    trainer = Trainer(
        config, workdir, "finetune", {"loss": "loss"},
        host_state=shapes.state, load_host_state=shapes.load,
    )  # fmt: skip
    state = trainer.restore(new_state(stage.split.trainable, stage.optimizer))
    every = HostRows(
        config.batch_size, np.arange(config.batch_size), np.ones(config.batch_size, bool)
    )

    def batch_of(step: int) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and references of a whole step: every host packs all of them alike."""
        prompts, limit = stage.prompts(step, every), config.finetune.max_new_tokens
        references = encode_references(stage.tokenizer, prompts.problems)
        for problem, ids in zip(prompts.problems, references, strict=True):
            if len(ids) > limit:
                raise UserError(
                    f"a reference completion has {len(ids)} tokens, over the limit of {limit}: "
                    f"{problem.prompt[:60]!r}; raise config.finetune.max_new_tokens"
                )
        return prompts.tokens, references

    batches = prepared(batch_of, int(state.step), config.steps)

    def one_step(state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        prompts, completions = next(batches)
        prompt_J, completion_J = (
            np.asarray([len(ids) for ids in side]) for side in (prompts, completions)
        )
        packed = shapes.fit(Lengths(prompt_J, np.arange(len(prompt_J)), completion_J))
        trainer.shapes(packed.shape)
        batch = _placed(prompts, completions, stage.tokenizer.pad_id, packed)
        with waiting(f"step {step + 1}"):
            state, metrics = step_fn(state, stage.split.fixed, batch, step_key(config.seed, step))
        work = Work.of(prompt_J + completion_J)
        metrics |= {
            "data/padding": packed.padding,
            "model_flops": stage.flops.finetune_step(work, int(completion_J.sum())),
        }
        return state, metrics | stage.learning_rates(step)

    state = trainer.run(state, one_step)
    stage.finish(trainer, stage.chosen(trainer, state), before)


def _placed(
    prompts: list[list[int]], completions: list[list[int]], pad_id: int, packed: Packed
) -> Completions:
    """This host's rows of a batch, on the devices."""
    rows = host_rows(packed.shape.rows)
    here = np.flatnonzero(np.isin(packed.row_of_J, rows.index_B))
    batch = pack_completions(
        [prompts[j] for j in here],
        [completions[j] for j in here],
        pad_id,
        row_of=rows.find(packed.row_of_J[here]),
        shape=(len(rows.index_B), packed.shape.length, packed.shape.width),
        numbers=here,
    )
    return place_rows(batch, rows)
