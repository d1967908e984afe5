"""Fine-tunes a model on reference completions, to raise its accuracy enough for RL."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from jexit.config import Config
from jexit.data.loader import prepared, references_within
from jexit.dist import HostRows, waiting
from jexit.loops.flops import PassSize
from jexit.loops.packing import Lengths
from jexit.loops.setup import sample_policy, with_trained_exits
from jexit.loops.stage import Stage
from jexit.loops.trainer import Trainer
from jexit.model.policies import Full, Policy
from jexit.steps.finetune import make_finetune_step
from jexit.steps.state import TrainState, new_state, step_key


def finetune(config: Config, workdir: pathlib.Path) -> None:
    """Fine-tunes for `config.steps` steps and writes the model to `WORKDIR/model`.

    With `finetune.policy=full`, the written model has no exits, and the adapters are merged into
    its base weights. With `sample`, depths are drawn with the settings under which the exits were
    trained, and the written model keeps its exits.
    """
    policy: Policy = Full()
    if config.finetune.policy == "sample":
        config = with_trained_exits(config)
        policy = sample_policy(config)
    stage = Stage.open(config, workdir, updates=config.steps)
    before = stage.measure_before()
    step_fn = make_finetune_step(
        stage.split, stage.optimizer, policy=policy, micro_batches=config.optim.accumulate
    )
    shapes = stage.packed_shapes(shared=False)
    trainer = Trainer(config, workdir, "finetune", {"loss": "loss"}, kept=(shapes,))
    state = trainer.restore(new_state(stage.split.trainable, stage.optimizer))
    every = HostRows(
        config.batch_size, np.arange(config.batch_size), np.ones(config.batch_size, bool)
    )

    def batch_of(step: int) -> tuple[list[list[int]], list[list[int]]]:
        """Returns (prompts, references), the token ids of the whole batch of step `step`.

        Raises SharedUserError if a reference has more than `finetune.max_new_tokens` tokens.
        """
        prompts, limit = stage.prompts(step, every), config.finetune.max_new_tokens
        return prompts.tokens, references_within(stage.tokenizer, prompts.problems, limit)

    batches = prepared(batch_of, int(state.step), config.steps)

    def one_step(state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        prompts, completions = next(batches)
        prompt_J, completion_J = (
            np.asarray([len(ids) for ids in side]) for side in (prompts, completions)
        )
        number_J = np.arange(len(prompts))
        packed = shapes.fit(Lengths(prompt_J, number_J, completion_J))
        trainer.shapes(packed.shape)
        batch = packed.placed(
            prompts, completions, stage.tokenizer.pad_id, numbers=number_J, prompt_of=number_J
        )
        with waiting(f"step {step + 1}"):
            state, metrics = step_fn(state, stage.split.fixed, batch, step_key(config.seed, step))
        size = PassSize.of(prompt_J + completion_J)
        metrics |= {
            "data/padding": packed.padding,
            "model_flops": stage.flops.finetune_step(size, int(completion_J.sum())),
        }
        return state, metrics | stage.learning_rates(step)

    stage.finish(trainer, trainer.chosen(trainer.run(state, one_step)), before)
