"""Makes the teacher's trajectories once, stores them on disk and batches them by length.

A trajectory is a prompt with one completion.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from jexit.config import Config
from jexit.data.buckets import LengthBuckets
from jexit.data.loader import PromptBatch, encode_references
from jexit.data.teacher_store import TeacherStore, Trajectory
from jexit.dist import HostRows, barrier, from_primary, host_rows
from jexit.errors import UserError
from jexit.io.fingerprint import fingerprint
from jexit.io.progress import Progress
from jexit.loops.stage import Stage
from jexit.model.attention import choose_attention
from jexit.rollout import rollout
from jexit.steps.completions import Completions, pack_completions
from jexit.steps.state import step_key

TEACHER_STREAM = 1  # stream of `step_key` for the teacher's own generations


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """The teacher's trajectories grouped into rows; a row contains completions of one prompt."""

    rows: list[list[Trajectory]]
    buckets: LengthBuckets
    seed: int
    pad_id: int
    shared: bool  # whether the completions of a row share one copy of their prompt

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, config: Config, made: list[Trajectory], pad_id: int) -> Trajectories:
        """Groups adjacent trajectories of the same prompt into rows of up to `sft.completions`."""
        most, rows = config.sft.completions, []
        for trajectory in made:
            if rows and len(rows[-1]) < most and rows[-1][0].prompt == trajectory.prompt:
                rows[-1].append(trajectory)
            else:
                rows.append([trajectory])
        longest = config.task.max_prompt_tokens + most * config.sft.max_new_tokens
        shared = most > 1 and choose_attention(config.model.attention, longest) != "splash"
        buckets = LengthBuckets(
            [len(row[0].prompt) * (1 if shared else len(row)) for row in rows],
            [sum(len(one.completion) for one in row) for row in rows],
        )
        return cls(rows, buckets, config.seed, pad_id, shared)

    def batch(self, step: int, here: HostRows) -> tuple[Completions, list[list[Trajectory]]]:
        """Returns the packed rows `here` of step `step`'s batch, and the trajectories of the batch.

        `here` are the rows that this host prepares. The trajectories are a list per row of the
        whole batch.
        """
        index_B, shape = self.buckets.batch(seed=self.seed, step=step, batch_size=here.total)
        mine = [self.rows[index] for index in index_B[here.index_B]]
        row_of = [index for index, row in enumerate(mine) for _ in row]
        batch = pack_completions(
            [one.prompt for row in mine for one in row],
            [one.completion for row in mine for one in row],
            self.pad_id,
            row_of=row_of,
            shape=(len(mine), *shape),
            prompt_of=row_of if self.shared else None,
        )
        return batch, [self.rows[index] for index in index_B]


def rows_of_batch(config: Config) -> int:
    """Returns the number of rows per training step, which hold `batch_size` completions in all."""
    return config.batch_size // config.sft.completions


def teacher_trajectories(stage: Stage) -> Trajectories:
    """Returns up to `sft.pool` trajectories.

    `sft.trajectories` selects whether the completions are the teacher's or the data set's
    references. Completions of one token are left out. Trajectories that an earlier run with the
    same settings has stored in the working directory are read from disk, whatever its pool was.
    Raises UserError if no completion has more than one token.
    """
    config, sft, split, tokenizer = stage.config, stage.config.sft, stage.split, stage.tokenizer
    prompts = max(1, min(sft.generate_batch, sft.pool) // sft.completions)
    batch_size = prompts * sft.completions
    batches = -(-sft.pool // batch_size)
    settings = {
        "model": fingerprint((split.fixed.teacher, split.fixed.frozen)),
        "task": dataclasses.asdict(config.task),
        "source": sft.trajectories,
        "batch_size": batch_size,
        "completions": sft.completions,
        "temperature": sft.temperature,
        "max_new_tokens": sft.max_new_tokens,
        "seed": config.seed,
    }
    store = TeacherStore(stage.workdir / "teacher", settings, writer=jax.process_index())
    barrier("opening the teacher's trajectories")
    store.read()
    missing = [step for step in range(batches) if not store.holds(step, batch_size)]
    missing = from_primary("the teacher's missing trajectories", missing)
    start = batches - len(missing)
    with Progress(batches, start=start, description="teacher trajectories") as progress:
        for number, step in enumerate(missing, start=1 + start):
            own = host_rows(prompts)
            batch = stage.prompts(step, own)
            if sft.trajectories == "dataset":
                made = _references(stage, batch)
            else:
                made, own = _generated(stage, step, batch, prompts)
            # One token has no action position: nothing to calibrate.
            rows = [one if len(one.completion) > 1 else None for one in made]
            mine = np.flatnonzero(own.first_B)
            store.append(step, own.index_B[mine], [rows[index] for index in mine])
            progress.update(number)
    barrier("the teacher's trajectories")
    store.read()
    made = store.trajectories(batches)[: sft.pool]
    if not made and sft.trajectories == "dataset":
        raise UserError(
            "all reference completions of the task end after one token, but calibration needs "
            "longer ones; use a task with longer references, or set "
            "config.sft.trajectories=generate"
        )
    if not made:
        raise UserError(
            "all of the teacher's completions end after one token, but calibration needs longer "
            "ones; check the model and its chat template, or set config.sft.trajectories=dataset "
            "for a task with longer references"
        )
    return Trajectories.of(config, made, tokenizer.pad_id)


def _references(stage: Stage, batch: PromptBatch) -> list[Trajectory]:
    """Returns this host's prompts with the reference completions of the data set.

    The completions are cut to `sft.max_new_tokens` tokens.
    """
    remedy = "set config.sft.trajectories=generate"
    references = encode_references(stage.tokenizer, batch.problems, remedy=remedy)
    most = stage.config.sft.max_new_tokens
    return [
        Trajectory(prompt, ids[:most]) for prompt, ids in zip(batch.tokens, references, strict=True)
    ]


def _generated(
    stage: Stage, step: int, batch: PromptBatch, total: int
) -> tuple[list[Trajectory], HostRows]:
    """Returns this host's prompts, completed by the teacher, and the rows of these completions.

    The rows are indices in the whole batch, which has `total` prompts.
    """
    config, sft, tokenizer = stage.config, stage.config.sft, stage.tokenizer
    made = rollout(
        stage.split.decodable_teacher(stage.split.trainable),
        batch.tokens,
        max_new_tokens=sft.max_new_tokens,
        temperature=sft.temperature,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        key=step_key(config.seed, step, TEACHER_STREAM),
        adapters=False,
        samples_per_prompt=sft.completions,
        total=total,
        size=config.engine,
    )
    return [
        Trajectory(made.prompts[prompt], made.completion(row))
        for row, prompt in enumerate(made.prompt_B)
    ], made.host_rows
