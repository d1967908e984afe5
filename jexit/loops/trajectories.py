"""The teacher's trajectories: made once, kept on disk, dealt out in batches of similar length."""

from __future__ import annotations

import dataclasses

import jax

from jexit.data.buckets import LengthBuckets
from jexit.data.loader import encode_references
from jexit.data.teacher_store import TeacherStore, Trajectory
from jexit.dist import HostRows, barrier, from_primary, host_rows, is_primary
from jexit.io.fingerprint import fingerprint
from jexit.io.progress import Progress
from jexit.loops.setup import engine_size
from jexit.loops.stage import Stage
from jexit.rollout import rollout
from jexit.steps.completions import Completions, pad_completions
from jexit.steps.state import step_key

TEACHER_STREAM = 1  # of step_key: the teacher's own generations


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """Prompts with the teacher's completions, which a step draws by their length."""

    rows: list[Trajectory]
    buckets: LengthBuckets
    seed: int
    pad_id: int

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, step: int, here: HostRows) -> tuple[Completions, list[Trajectory]]:
        """This host's rows of a step's batch, and all of the batch."""
        index_B, shape = self.buckets.batch(seed=self.seed, step=step, batch_size=here.total)
        mine = [self.rows[index] for index in index_B[here.index_B]]
        batch = pad_completions(
            [row.prompt for row in mine], [row.completion for row in mine], self.pad_id, shape
        )
        return batch, [self.rows[index] for index in index_B]


def teacher_trajectories(stage: Stage) -> Trajectories:
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
    store = TeacherStore(stage.workdir / "teacher", settings, writer=jax.process_index())
    barrier("opening the teacher's trajectories")
    store.read()
    missing = [step for step in range(batches) if not store.holds(step, batch_size)]
    missing = from_primary("the teacher's missing trajectories", missing)
    here = host_rows(batch_size)
    with Progress(
        batches,
        start=batches - len(missing),
        description="teacher trajectories",
        enabled=is_primary(),
    ) as progress:
        for number, step in enumerate(missing, start=1 + batches - len(missing)):
            batch = stage.prompts(step, here)
            if sft.trajectories == "dataset":
                remedy = "set config.sft.trajectories=generate"
                completions = [
                    ids[: sft.max_new_tokens]
                    for ids in encode_references(tokenizer, batch.problems, remedy=remedy)
                ]
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
                    total=batch_size,
                    size=engine_size(config),
                )
                completions = [result.completion(row) for row in range(result.rows)]
            rows = [
                # One token has no action position: nothing to calibrate.
                Trajectory(prompt, ids) if len(ids) > 1 else None
                for prompt, ids in zip(batch.tokens, completions, strict=True)
            ]
            mine = [place for place, first in enumerate(here.first_B) if first]
            store.append(step, here.index_B[mine], [rows[place] for place in mine])
            progress.update(number)
    barrier("the teacher's trajectories")
    store.read()
    made = store.trajectories[: sft.pool]
    if not made:
        raise ValueError(
            "the teacher's completions all end at once, so there is nothing to calibrate on; "
            "check the model and its chat template, or set config.sft.trajectories=dataset"
        )
    buckets = LengthBuckets(
        [len(row.prompt) for row in made], [len(row.completion) for row in made]
    )
    return Trajectories(made, buckets, config.seed, tokenizer.pad_id)
