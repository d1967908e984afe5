"""Reinforcement learning: rollouts, verdicts, and one update a batch."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from jexit.config import Config
from jexit.data.loader import PromptBatch, prepared
from jexit.data.tokenizer import Tokenizer
from jexit.dist import data_shards, gather, host_rows, place_rows, waiting
from jexit.evaluation.accuracy import text_means
from jexit.loops.flops import Work
from jexit.loops.packing import Lengths, Packed, PackedShapes
from jexit.loops.pressure import AccuracyFloor, FailureWatch, Pressure
from jexit.loops.setup import sampling_law
from jexit.loops.stage import Stage
from jexit.loops.trainer import Collapsed, Trainer
from jexit.model.attention import choose_attention
from jexit.rollout import Rollouts, rollout
from jexit.steps.completions import pack_completions
from jexit.steps.rl import RLBatch, make_rl_step
from jexit.steps.state import TrainState, new_state, step_key
from jexit.tasks import Problem, Task, Verdict

ROLLOUT_STREAM = 2  # of step_key: the sampler's noise


def reinforce(config: Config, workdir: pathlib.Path) -> None:
    """Runs stage 2 and writes `WORKDIR/model`: base reference, adapters and exit heads."""
    rl = config.rl
    stage = Stage.open(config, workdir, updates=config.steps * rl.updates_per_batch)
    task, tokenizer, split, layers = stage.task, stage.tokenizer, stage.split, stage.layers
    before = stage.measure_before()
    step_fn = make_rl_step(split, stage.optimizer, rl, micro_batches=config.optim.accumulate)
    pressure = Pressure(rl, AccuracyFloor.absolute(rl))
    watch = FailureWatch(stage.exit_layers[0] / layers, pressure, rl.stop_on_collapse)
    attention = config.model.attention
    shapes = PackedShapes(
        data_shards(),
        config.optim.accumulate,
        stage.flops.arch.width,
        config.task.max_prompt_tokens + rl.max_new_tokens,
        lambda length: choose_attention(attention, length) != "splash",
    )

    def load_host_state(values: dict[str, np.ndarray]) -> None:
        for part in (pressure, watch, shapes):
            part.load(values)

    trainer = Trainer(
        config,
        workdir,
        "rl",
        shown={
            "accuracy": "accuracy",
            "depth/fraction": "depth/fraction",
            "reward/mean": "reward",
        },
        host_state=lambda: pressure.state() | watch.state() | shapes.state(),
        load_host_state=load_host_state,
        measure=(
            (lambda state: stage.validation(state, pressure.floor.held_out))
            if config.checkpoint.keep_best
            else None
        ),
    )
    state = trainer.restore(new_state(split.trainable, stage.optimizer))
    if int(state.step) == 0 and rl.floor_of == "initial":
        pressure.floor = stage.initial_floor()

    here, law = host_rows(config.batch_size), sampling_law(config)
    batches = prepared(lambda step: stage.prompts(step, here), int(state.step), config.steps)
    failure = ""

    def one_step(state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        nonlocal failure
        if failure:
            raise Collapsed(f"stopped after step {step}: {failure}")
        prompts = next(batches)
        rollouts = rollout(
            split.decodable(state.trainable),
            prompts.tokens,
            policy=law,
            max_new_tokens=rl.max_new_tokens,
            temperature=rl.temperature,
            eos_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
            key=step_key(config.seed, step, ROLLOUT_STREAM),
            samples_per_prompt=rl.rollouts,
            total=config.batch_size,
            size=config.engine,
        )
        texts, verdicts = judge(task, tokenizer, prompts, rollouts)
        totals = Totals.over_hosts(
            task,
            rollouts,
            [prompts.problems[place] for place in rollouts.prompt_B],
            texts,
            verdicts,
            prompts.skipped,
            stage.flops.rollouts(rollouts, rollouts.host_rows.first_B, samples=rl.rollouts),
            rl.rollouts,
        )
        packed = shapes.fit(totals.lengths)
        batch = rl_batch(rollouts, verdicts, tokenizer.pad_id, packed)
        trainer.shapes((packed.shape, rollouts.shape))
        penalties = pressure.penalties(step)
        with waiting(f"step {step + 1}"):
            state, metrics = step_fn(
                state, split.fixed, batch, penalties, step_key(config.seed, step)
            )
        pressure.observe(totals.accuracy)
        failure = watch.observe(step + 1, totals.mean_depth(layers) / layers, totals.mean_length)
        if step % config.log.samples_every == 0:
            count = min(config.log.samples, rollouts.rows)
            records = [
                sample_record(row, prompts, rollouts, texts, verdicts, tokenizer)
                for row in np.linspace(0, rollouts.rows - 1, count).astype(int)
            ]
            trainer.samples.write(step + 1, records)
        metrics |= {
            "accuracy": totals.accuracy,
            "depth_coef": penalties.depth_coef,
            "length_coef": penalties.length_coef,
            "rollout_seconds": rollouts.seconds,
            "data/skipped": totals.skipped,
            "data/padding": packed.padding,
            "engine/idle": rollouts.efficiency.idle,
            "engine/prompt_padding": rollouts.efficiency.prompt_padding,
            "model_flops": totals.rollout_flops
            + stage.flops.rl_step(totals.work, totals.tokens, updates=rl.updates_per_batch),
        }
        metrics |= {f"task/{name}": value for name, value in totals.text.items()}
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
                f"{collapse}; no checkpoint from before is kept, for which set "
                "config.checkpoint.every and keep_best"
            ) from None
        stage.finish(trainer, good, before)
        raise Collapsed(
            f"{collapse}; {workdir / 'model'} is of step {step}, the last checkpoint before"
        ) from None
    stage.finish(trainer, stage.chosen(trainer, state), before)


def judge(
    task: Task, tokenizer: Tokenizer, prompts: PromptBatch, rollouts: Rollouts
) -> tuple[list[str], list[Verdict]]:
    """Each completion's text and verdict."""
    completions = [rollouts.completion(row) for row in range(rollouts.rows)]
    problems = [prompts.problems[place] for place in rollouts.prompt_B]
    return [tokenizer.decode(ids) for ids in completions], [
        task.verify(problem, task.answerable(tokenizer.completion_text(ids), cut=bool(cut)))
        for problem, ids, cut in zip(problems, completions, rollouts.truncated_B, strict=True)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Totals:
    """What all hosts' rollouts come to; each row counts once, wherever it lies."""

    rows: int
    correct: int
    tokens: int  # generated
    rollout_flops: float
    passes: int  # that could leave early
    layers_run: int  # by those
    skipped: int
    text: dict[str, float]
    lengths: Lengths  # of every host's

    @classmethod
    def over_hosts(
        cls,
        task: Task,
        rollouts: Rollouts,
        problems: list[Problem],
        texts: list[str],
        verdicts: list[Verdict],
        skipped: int,
        rollout_flops: float,
        samples: int,
    ) -> Totals:
        """`skipped` and `rollout_flops` are this host's; `samples` completions have one prompt."""
        first_B = rollouts.host_rows.first_B
        lengths_B = rollouts.lengths_B
        mine = {
            "rows": int(first_B.sum()),
            "correct": sum(v.correct for v, first in zip(verdicts, first_B, strict=True) if first),
            "tokens": int(lengths_B[first_B].sum()),
            "rollout_flops": rollout_flops,
            "passes": int((lengths_B[first_B] - 1).sum()),
            "layers_run": int(rollouts.depths_BT[first_B, 1:].sum()),
            "skipped": skipped if first_B.any() else 0,
        }
        own = np.flatnonzero(first_B)
        mine_problems = [problems[row] for row in own]
        mine_texts = [texts[row] for row in own]
        hosts = gather(
            "verified rollouts",
            mine
            | {
                "numbers": rollouts.host_rows.index_B[own].tolist(),
                "lengths": lengths_B[own].tolist(),
                "prompts": rollouts.prompt_lengths_B[own].tolist(),
                "text": task.text_totals(mine_problems, mine_texts),
            },
        )

        def in_order(name: str) -> np.ndarray:
            values_J = np.zeros(rollouts.host_rows.total, np.int64)
            for host in hosts:
                values_J[host["numbers"]] = host[name]
            return values_J

        return cls(
            **{name: sum(host[name] for host in hosts) for name in mine},
            text=text_means([host["text"] for host in hosts]),
            lengths=Lengths(
                prompt_J=in_order("prompts"),
                number_J=np.arange(rollouts.host_rows.total) // samples,
                completion_J=in_order("lengths"),
            ),
        )

    @property
    def accuracy(self) -> float:
        return self.correct / self.rows

    @property
    def work(self) -> Work:
        """Of a pass over all completions, each prompt once."""
        prompt_J, number_J, completion_J = self.lengths
        first_J = np.diff(number_J, prepend=-1) > 0
        return Work.of_branches(prompt_J, completion_J, first_J)

    @property
    def mean_length(self) -> float:
        return self.tokens / self.rows

    def mean_depth(self, layers: int) -> float:
        """Over action positions: every generated token but a row's first."""
        return self.layers_run / self.passes if self.passes else float(layers)


def rl_batch(rollouts: Rollouts, verdicts: list[Verdict], pad_id: int, packed: Packed) -> RLBatch:
    """This host's rollouts and verdicts as the arrays of an update, on the devices."""
    shape, own = packed.shape, rollouts.host_rows
    rows = host_rows(shape.rows)
    row_of_J = packed.row_of_J[own.index_B]
    here = np.flatnonzero(np.isin(row_of_J, rows.index_B))
    completions = pack_completions(
        [rollouts.prompts[rollouts.prompt_B[row]] for row in here],
        [rollouts.completion(row) for row in here],
        pad_id,
        row_of=rows.find(row_of_J[here]),
        shape=(len(rows.index_B), shape.length, shape.width),
        prompt_of=rollouts.prompt_B[here] if packed.shared else None,
        numbers=own.index_B[here],
    )
    arrays = (
        rollouts.lengths_B,
        rollouts.depths_BT,
        rollouts.logprobs_BT,
        rollouts.depth_logprobs_BT,
        np.asarray([verdict.reward for verdict in verdicts], np.float32),
        rollouts.truncated_B,
    )
    return RLBatch(place_rows(completions, rows), *place_rows(arrays, own))


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
    problem = prompts.problems[rollouts.prompt_B[row]]
    return {
        "prompt": problem.prompt,
        "completion": texts[row],
        "tokens": tokenizer.tokens(ids),
        "depths": rollouts.depths_BT[row, : len(ids)].tolist(),
        "reward": verdicts[row].reward,
        "verdict": verdicts[row].kind,
        "answer": problem.answer,
    }
