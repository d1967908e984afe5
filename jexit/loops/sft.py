"""Calibration: teacher trajectories once, then steps that shape the exits."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from jexit.config import Config
from jexit.data.buckets import LengthBuckets
from jexit.data.teacher_store import TeacherStore, Trajectory
from jexit.data.tokenizer import Tokenizer
from jexit.io.progress import Progress
from jexit.loops.stage import Stage
from jexit.loops.trainer import Trainer
from jexit.rollout import rollout
from jexit.steps.completions import pad_completions
from jexit.steps.sft import make_sft_step
from jexit.steps.state import TrainState, fingerprint, new_state, step_key
from jexit.tasks import Problem

TEACHER_STREAM = 1  # of step_key: the teacher's own generations


def calibrate(config: Config, workdir: pathlib.Path) -> None:
    """Runs stage 1 and writes `WORKDIR/model`: base reference, adapters and exit heads."""
    stage = Stage.open(config, workdir, updates=config.steps)
    trajectories = teacher_trajectories(stage)
    buckets = LengthBuckets(
        [len(row.prompt) for row in trajectories], [len(row.completion) for row in trajectories]
    )
    before = stage.measure_before()
    step_fn = make_sft_step(
        stage.split, stage.optimizer, config.sft, micro_batches=config.optim.accumulate
    )
    shown = ("kl/teacher", "loss/exit", "depth/fraction")
    trainer = Trainer(config, workdir, "sft", shown={name: name for name in shown})
    state = trainer.restore(new_state(stage.split.trainable, stage.optimizer))

    def one_step(state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        index_B, shape = buckets.batch(seed=config.seed, step=step, batch_size=config.batch_size)
        rows = [trajectories[index] for index in index_B]
        batch = pad_completions(
            [row.prompt for row in rows],
            [row.completion for row in rows],
            stage.tokenizer.pad_id,
            shape,
        )
        used = sum(len(row.prompt) + len(row.completion) for row in rows)
        state, metrics = step_fn(state, stage.split.fixed, batch, step_key(config.seed, step))
        metrics["data/padding"] = 1.0 - used / batch.tokens_BT.size
        return state, metrics | stage.learning_rates(step)

    state = trainer.run(state, one_step)
    trainer.close()
    stage.finish(state, before)


def teacher_trajectories(stage: Stage) -> list[Trajectory]:
    """`sft.pool` completions by the teacher (or the data set's own), those on disk not again."""
    config, sft, split, tokenizer = stage.config, stage.config.sft, stage.split, stage.tokenizer
    batch_size = min(sft.generate_batch, sft.pool)
    batches = -(-sft.pool // batch_size)
    settings = {
        "model": fingerprint((split.fixed.teacher, split.fixed.frozen)),
        "task": dataclasses.asdict(config.task),
        "source": sft.trajectories,
        "pool": sft.pool,
        "batch_size": batch_size,
        "temperature": sft.temperature,
        "max_new_tokens": sft.max_new_tokens,
        "seed": config.seed,
    }
    store = TeacherStore(stage.workdir / "teacher", settings)
    with Progress(batches, start=store.batches, description="teacher trajectories") as progress:
        for step in range(store.batches, batches):
            batch = stage.prompts(step, batch_size)
            if sft.trajectories == "dataset":
                completions = dataset_completions(batch.problems, tokenizer, sft.max_new_tokens)
            else:
                result = rollout(
                    split.decodable_teacher(split.trainable),
                    batch.tokens,
                    max_new_tokens=sft.max_new_tokens,
                    temperature=sft.temperature,
                    eos_ids=tokenizer.eos_ids,
                    pad_id=tokenizer.pad_id,
                    key=step_key(config.seed, step, TEACHER_STREAM),
                    adapters=False,
                )
                completions = [result.completion(row) for row in range(result.rows)]
            pairs = zip(batch.tokens, completions, strict=True)
            # One token has no action position: nothing to calibrate.
            store.append([Trajectory(prompt, ids) for prompt, ids in pairs if len(ids) > 1])
            progress.update(step + 1)
    made = store.trajectories[: sft.pool]
    if not made:
        raise ValueError(
            "the teacher's completions all end at once, so there is nothing to calibrate on; "
            "check the model and its chat template, or set config.sft.trajectories=dataset"
        )
    return made


def dataset_completions(
    problems: Sequence[Problem], tokenizer: Tokenizer, max_new_tokens: int
) -> list[list[int]]:
    """The data set's own answers with the end token, cut to `max_new_tokens`."""
    missing = [problem for problem in problems if problem.completion is None]
    if missing:
        raise ValueError(
            f"the task has no reference completion for {missing[0].prompt[:40]!r}; set "
            "config.sft.trajectories=generate"
        )
    texts = [problem.completion for problem in problems]
    return [[*ids, tokenizer.eos_id][:max_new_tokens] for ids in tokenizer.encode_batch(texts)]
