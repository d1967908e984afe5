"""Reinforcement learning: each step decodes rollouts, judges them and updates the model.

A rollout is a completion sampled from the current model, with early exits; the task judges it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, Self

import numpy as np

from jexit.config import Config
from jexit.data.loader import PromptBatch, prepared
from jexit.data.tokenizer import Tokenizer
from jexit.dist import gather, host_rows, place_rows, waiting
from jexit.evaluation.accuracy import judged, part_totals, text_means
from jexit.evaluation.decoder import attempts_of
from jexit.loops.flops import PassSize
from jexit.loops.packing import Lengths, Packed
from jexit.loops.penalties import AccuracyFloor, FailureWatch, PenaltySchedule
from jexit.loops.setup import sample_policy
from jexit.loops.stage import Stage
from jexit.loops.trainer import Collapsed, Trainer
from jexit.rollout import Rollouts, rollout
from jexit.steps.rl import RLBatch, make_rl_step
from jexit.steps.state import TrainState, new_state, step_key
from jexit.tasks import Attempt, Problem, Task, Verdict

ROLLOUT_STREAM = 2  # stream of `step_key` for the sampler's noise


def reinforce(config: Config, workdir: pathlib.Path) -> None:
    """Trains the model by reinforcement learning and writes it to `WORKDIR/model`.

    With LoRA, the written model consists of a reference to the base model, the adapters and the
    exit heads. If `rl.stop_on_collapse` stops the run, the model of the last kept checkpoint from
    before the collapse, if any, is written instead, and Collapsed is raised.
    """
    rl = config.rl
    stage = Stage.open(config, workdir, updates=config.steps * rl.updates_per_batch)
    tokenizer, split, layers = stage.tokenizer, stage.split, stage.layers
    before = stage.measure_before()
    step_fn = make_rl_step(split, stage.optimizer, rl, micro_batches=config.optim.accumulate)
    schedule = PenaltySchedule(rl, AccuracyFloor(rl.accuracy_floor, rl.accuracy_floor))
    watch = FailureWatch(stage.exit_layers[0] / layers, schedule, rl.stop_on_collapse)
    shapes = stage.packed_shapes(shared=True)
    trainer = Trainer(
        config,
        workdir,
        "rl",
        shown={"accuracy": "accuracy", "depth/fraction": "depth/fraction", "reward/mean": "reward"},
        kept=(schedule, watch, shapes),
        measure=(
            (lambda state: stage.validation(state, schedule.floor.held_out))
            if config.checkpoint.keep_best
            else None
        ),
    )
    state = trainer.restore(new_state(split.trainable, stage.optimizer))
    if int(state.step) == 0 and rl.floor_of == "initial":
        schedule.floor = stage.initial_floor()

    here, policy = host_rows(config.batch_size), sample_policy(config)
    batches = prepared(lambda step: stage.prompts(step, here), int(state.step), config.steps)
    failure = "it had collapsed before it was resumed" if watch.must_stop else ""

    def one_step(state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        nonlocal failure
        if failure:
            raise Collapsed(f"stopped after step {step}: {failure}")
        prompts = next(batches)
        rollouts = rollout(
            split.decodable(state.trainable),
            prompts.tokens,
            policy=policy,
            max_new_tokens=rl.max_new_tokens,
            temperature=rl.temperature,
            eos_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
            key=step_key(config.seed, step, ROLLOUT_STREAM),
            samples_per_prompt=rl.rollouts,
            total=config.batch_size,
            size=config.engine,
        )
        own = Judged.of(stage.task, tokenizer, prompts, rollouts)
        totals = Totals.over_hosts(
            stage.task,
            own,
            samples=rl.rollouts,
            skipped=prompts.skipped,
            rollout_flops=stage.flops.rollouts(
                rollouts, rollouts.host_rows.first_B, samples=rl.rollouts
            ),
        )
        packed = shapes.fit(totals.lengths)
        batch = rl_batch(own, tokenizer.pad_id, packed)
        trainer.shapes((packed.shape, rollouts.shape))
        penalties = schedule.penalties()
        with waiting(f"step {step + 1}"):
            state, metrics = step_fn(
                state, split.fixed, batch, penalties, step_key(config.seed, step)
            )
        schedule.observe(totals.accuracy)
        mean_length = totals.tokens / totals.rows
        depth_fraction = totals.mean_depth(layers) / layers
        failure = watch.observe(step + 1, totals.accuracy, depth_fraction, mean_length)
        if step % config.log.samples_every == 0:
            count = min(config.log.samples, rollouts.rows)
            rows = np.linspace(0, rollouts.rows - 1, count).astype(int)
            trainer.samples.write(step + 1, [own.sample(row, tokenizer) for row in rows])
        metrics |= {
            "accuracy": totals.accuracy,
            "depth_coef": penalties.depth_coef,
            "length_coef": penalties.length_coef,
            "rollout_seconds": rollouts.seconds,
            "data/skipped": totals.skipped,
            "data/padding": packed.padding,
            "engine/idle": rollouts.idle,
            "engine/prompt_padding": rollouts.prompt_padding,
            "model_flops": totals.rollout_flops
            + stage.flops.rl_step(totals.pass_size, totals.tokens, updates=rl.updates_per_batch),
        }
        metrics |= {f"task/{name}": value for name, value in totals.text.items()} | totals.parts
        return state, metrics | stage.learning_rates(step)

    try:
        state = trainer.run(state, one_step)
        if failure:  # at the last update
            raise Collapsed(f"stopped after step {config.steps}: {failure}")
    except Collapsed as collapse:
        good, step = trainer.good(state, watch.good_step)
        if good is None:
            trainer.close()
            raise Collapsed(
                f"{collapse} (no checkpoint from before the collapse was kept; to keep one, set "
                "config.checkpoint.every and config.checkpoint.keep_best)"
            ) from None
        stage.finish(trainer, good, before)
        raise Collapsed(
            f"{collapse} ({workdir / 'model'} contains the model of step {step}, the last "
            "checkpoint before the collapse)"
        ) from None
    stage.finish(trainer, trainer.chosen(state), before)


@dataclasses.dataclass(frozen=True)
class Judged:
    """The rollouts of this host; each row has a problem, an attempt (the text) and a verdict."""

    rollouts: Rollouts
    problems: list[Problem]
    attempts: list[Attempt]
    verdicts: list[Verdict]

    @classmethod
    def of(cls, task: Task, tokenizer: Tokenizer, prompts: PromptBatch, rollouts: Rollouts) -> Self:
        problems = [prompts.problems[index] for index in rollouts.prompt_B]
        attempts = attempts_of(rollouts, range(rollouts.rows), tokenizer.completion_text)
        verdicts = judged(task, problems, attempts)
        made = [
            dataclasses.replace(attempt, verdict=verdict)
            for attempt, verdict in zip(attempts, verdicts, strict=True)
        ]
        return cls(rollouts, problems, made, verdicts)

    def sample(self, row: int, tokenizer: Tokenizer) -> dict[str, Any]:
        """Returns row `row` as an entry for `samples.jsonl`: prompt, text, depths and verdict."""
        attempt, verdict = self.attempts[row], self.verdicts[row]
        return {
            "prompt": self.problems[row].prompt,
            "completion": attempt.text,
            "tokens": tokenizer.tokens(attempt.ids),
            "depths": attempt.depths,
            "reward": verdict.reward,
            "rewards": dict(verdict.parts),
            "verdict": verdict.kind,
            "answer": self.problems[row].answer,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Totals:
    """Totals over all hosts' rollouts in one step; a rollout on several hosts counts once."""

    rows: int
    correct: int
    tokens: int  # generated tokens
    rollout_flops: float
    passes: int  # passes that could leave early
    layers_run: int  # layers run by these passes
    skipped: int
    text: dict[str, float]
    parts: dict[str, float]  # `reward/NAME` of a task's own functions
    lengths: Lengths  # of all hosts' completions

    @classmethod
    def over_hosts(
        cls, task: Task, here: Judged, *, samples: int, skipped: int, rollout_flops: float
    ) -> Totals:
        """Returns the totals over all hosts; every host calls this with its own rollouts `here`.

        `samples` is the number of completions per prompt, `skipped` the number of prompts that this
        host skipped, and `rollout_flops` the FLOPs of this host's rollouts.
        """
        rollouts, own = here.rollouts, np.flatnonzero(here.rollouts.host_rows.first_B)
        lengths_B, total = rollouts.lengths_B[own], rollouts.host_rows.total
        attempts = [here.attempts[row] for row in own]
        mine = {
            "rows": len(own),
            "correct": sum(attempt.correct for attempt in attempts),
            "tokens": int(lengths_B.sum()),
            "rollout_flops": rollout_flops,
            "passes": int((lengths_B - 1).sum()),
            "layers_run": int(rollouts.depths_BT[own, 1:].sum()),
            "skipped": skipped if len(own) else 0,
        }
        text = task.text_totals([here.problems[row] for row in own], attempts)
        hosts = gather(
            "verified rollouts",
            mine
            | {
                "numbers": rollouts.host_rows.index_B[own].tolist(),
                "lengths": lengths_B.tolist(),
                "prompts": rollouts.prompt_lengths_B[own].tolist(),
                "text": text,
                "parts": part_totals(attempts),
            },
        )

        def in_order(name: str) -> np.ndarray:
            values_J = np.zeros(total, np.int64)
            for host in hosts:
                values_J[host["numbers"]] = host[name]
            return values_J

        return cls(
            **{name: sum(host[name] for host in hosts) for name in mine},
            text=text_means([host["text"] for host in hosts]),
            parts=text_means([host["parts"] for host in hosts]),
            lengths=Lengths(
                prompt_J=in_order("prompts"),
                number_J=np.arange(total) // samples,
                completion_J=in_order("lengths"),
            ),
        )

    @property
    def accuracy(self) -> float:
        return self.correct / self.rows

    @property
    def pass_size(self) -> PassSize:
        """The size of a forward pass over all completions, in which each prompt counts once."""
        prompt_J, number_J, completion_J = self.lengths
        first_J = np.diff(number_J, prepend=-1) > 0
        return PassSize.of_branches(prompt_J, completion_J, first_J)

    def mean_depth(self, layers: int) -> float:
        """Returns the mean depth of passes that could leave early; `layers` if there are none."""
        return self.layers_run / self.passes if self.passes else float(layers)


def rl_batch(own: Judged, pad_id: int, packed: Packed) -> RLBatch:
    """Returns the batch of an RL step, on the devices, from this host's judged rollouts `own`.

    `packed` is the placement of all hosts' rollouts in rows.
    """
    rollouts = own.rollouts
    rows = packed.placed(
        [rollouts.prompts[index] for index in rollouts.prompt_B],
        [rollouts.completion(row) for row in range(rollouts.rows)],
        pad_id,
        numbers=rollouts.host_rows.index_B,
        prompt_of=rollouts.prompt_B,
    )
    arrays = (
        rollouts.lengths_B,
        rollouts.depths_BT,
        rollouts.logprobs_BT,
        rollouts.depth_logprobs_BT,
        np.asarray([verdict.reward for verdict in own.verdicts], np.float32),
        rollouts.truncated_B,
    )
    return RLBatch(rows, *place_rows(arrays, rollouts.host_rows))
