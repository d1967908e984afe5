"""Reinforcement learning: rollouts, verdicts, and one update a batch."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from jexit.config import Config
from jexit.data.loader import PromptBatch
from jexit.data.tokenizer import Tokenizer
from jexit.dist import place_rows
from jexit.loops.pressure import FailureWatch, Pressure
from jexit.loops.stage import Stage
from jexit.loops.trainer import Trainer
from jexit.rollout import Rollouts, rollout
from jexit.steps.completions import pad_completions
from jexit.steps.rl import RLBatch, make_rl_step
from jexit.steps.state import TrainState, new_state, step_key
from jexit.tasks import Task, Verdict

ROLLOUT_STREAM = 2  # of step_key: the sampler's noise


def reinforce(config: Config, workdir: pathlib.Path) -> None:
    """Runs stage 2 and writes `WORKDIR/model`: base reference, adapters and exit heads."""
    rl = config.rl
    stage = Stage.open(config, workdir, updates=config.steps * rl.updates_per_batch)
    task, tokenizer, split, layers = stage.task, stage.tokenizer, stage.split, stage.layers
    before = stage.measure_before()
    step_fn = make_rl_step(split, stage.optimizer, rl, micro_batches=config.optim.accumulate)
    pressure = Pressure(rl)
    watch = FailureWatch(stage.exit_layers[0] / layers)

    def load_host_state(values: dict[str, np.ndarray]) -> None:
        pressure.load(values)
        watch.load(values)

    trainer = Trainer(
        config,
        workdir,
        "rl",
        shown={
            "accuracy": "accuracy",
            "depth/fraction": "depth/fraction",
            "reward/mean": "reward",
        },
        host_state=lambda: pressure.state() | watch.state(),
        load_host_state=load_host_state,
    )
    state = trainer.restore(new_state(split.trainable, stage.optimizer))

    def one_step(state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        prompts = stage.prompts(step, config.batch_size)
        rollouts = rollout(
            split.decodable(state.trainable),
            prompts.tokens,
            policy=stage.law,
            max_new_tokens=rl.max_new_tokens,
            temperature=rl.temperature,
            eos_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
            key=step_key(config.seed, step, ROLLOUT_STREAM),
            samples_per_prompt=rl.rollouts,
        )
        texts, verdicts = judge(task, tokenizer, prompts, rollouts)
        batch = rl_batch(rollouts, verdicts, tokenizer.pad_id)
        prices = pressure.prices(step)
        state, metrics = step_fn(state, split.fixed, batch, prices, step_key(config.seed, step))
        accuracy = float(np.mean([verdict.correct for verdict in verdicts]))
        pressure.observe(accuracy)
        watch.observe(
            step + 1,
            accuracy,
            rollouts.mean_depth / layers,
            float(rollouts.lengths_B.mean()),
        )
        if step % config.log.samples_every == 0:
            count = min(config.log.samples, rollouts.rows)
            records = [
                sample_record(row, prompts, rollouts, texts, verdicts, tokenizer)
                for row in np.linspace(0, rollouts.rows - 1, count).astype(int)
            ]
            trainer.samples.write(step + 1, records)
        metrics |= {
            "accuracy": accuracy,
            "depth_coef": prices.depth_coef,
            "length_coef": prices.length_coef,
            "rollout_seconds": rollouts.seconds,
            "data/skipped": prompts.skipped,
        }
        metrics |= {f"task/{name}": value for name, value in task.text_metrics(texts).items()}
        return state, metrics | stage.learning_rates(step)

    state = trainer.run(state, one_step)
    trainer.close()
    stage.finish(state, before)


def judge(
    task: Task, tokenizer: Tokenizer, prompts: PromptBatch, rollouts: Rollouts
) -> tuple[list[str], list[Verdict]]:
    """Each completion's text and verdict."""
    texts = [tokenizer.decode(rollouts.completion(row)) for row in range(rollouts.rows)]
    group = rollouts.samples_per_prompt
    return texts, [
        task.verify(prompts.problems[row // group], text) for row, text in enumerate(texts)
    ]


def rl_batch(rollouts: Rollouts, verdicts: list[Verdict], pad_id: int) -> RLBatch:
    """Rollouts and verdicts as the arrays of an update."""
    group = rollouts.samples_per_prompt
    completions = pad_completions(
        [rollouts.prompts[row // group] for row in range(rollouts.rows)],
        [rollouts.completion(row) for row in range(rollouts.rows)],
        pad_id,
    )
    width = completions.completion_tokens_BC.shape[1]

    def fitted(values_BT: np.ndarray) -> np.ndarray:
        values_BC = values_BT[:, :width]
        missing = width - values_BC.shape[1]
        return np.pad(values_BC, ((0, 0), (0, missing)))

    arrays = (
        fitted(rollouts.depths_BT),
        fitted(rollouts.logprobs_BT),
        fitted(rollouts.depth_logprobs_BT),
        np.asarray([verdict.reward for verdict in verdicts], np.float32),
        rollouts.truncated_B,
    )
    return RLBatch(completions, *place_rows(arrays))


def sample_record(
    row: int,
    prompts: PromptBatch,
    rollouts: Rollouts,
    texts: list[str],
    verdicts: list[Verdict],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """One completion for `samples.jsonl`, with the depth of the pass that produced each token."""
    ids = rollouts.completion(row)
    problem = prompts.problems[row // rollouts.samples_per_prompt]
    return {
        "prompt": problem.prompt,
        "completion": texts[row],
        "tokens": tokenizer.tokens(ids),
        "depths": rollouts.depths_BT[row, : len(ids)].tolist(),
        "reward": verdicts[row].reward,
        "verdict": verdicts[row].kind,
        "answer": problem.answer,
    }
