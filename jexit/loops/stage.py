"""Code shared by fine-tuning, calibration and RL: opening, measuring and ending a run."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import optax

from jexit.config import Config
from jexit.data.loader import PromptBatch, prompt_batch, references_within
from jexit.data.tokenizer import Tokenizer
from jexit.dist import HostRows, data_shards, from_primary, is_primary
from jexit.errors import UserError
from jexit.evaluation.accuracy import Examination, check_room, evaluate_policy, held_out
from jexit.evaluation.tables import print_change
from jexit.io.model_dir import save_model
from jexit.io.model_source import open_model
from jexit.io.workdir import start_run
from jexit.loops.flops import ModelFlops
from jexit.loops.packing import PackedShapes
from jexit.loops.penalties import AccuracyFloor, penalised_reward
from jexit.loops.pictures import draw
from jexit.loops.setup import load_model, load_task, make_decoder
from jexit.loops.trainer import Trainer, peak_memory
from jexit.model.attention import choose_attention
from jexit.model.lora import merge_adapters
from jexit.model.transformer import Transformer
from jexit.results import REMEDY, PolicyResult, checked
from jexit.steps.optim import make_optimizer, schedule, split_for_training
from jexit.steps.state import Params, SplitModel, TrainState
from jexit.tasks import Attempt, Task
from jexit.untrusted import read_json


@dataclasses.dataclass(frozen=True)
class Stage:
    """The objects that a run of fine-tuning, calibration or RL needs from beginning to end."""

    config: Config
    workdir: pathlib.Path
    task: Task
    tokenizer: Tokenizer
    split: SplitModel
    layers: int
    exit_layers: tuple[int, ...]
    flops: ModelFlops
    labels: Params  # the kind of each trainable parameter, which selects its learning rate
    optimizer: optax.GradientTransformation
    updates: int

    @classmethod
    def open(cls, config: Config, workdir: pathlib.Path, *, updates: int) -> Stage:
        """Loads the task and the model of `config`, starts the run and makes the optimiser.

        `updates` is the number of optimiser steps in the whole run. Raises UserError, before
        anything is written to `workdir`, if a prompt is too long or if fine-tuning with the policy
        `sample` lacks trained exits.
        """
        task = load_task(config.task, "train")
        model, tokenizer = load_model(config, trains=True)
        check_prompts(task, tokenizer, config, model.arch.max_positions)
        sampled = config.command == "finetune" and config.finetune.policy == "sample"
        if sampled and not open_model(config.model.path).exit_layers:
            raise UserError(
                f"config.finetune.policy is 'sample', but the model in {config.model.path} has no "
                "trained exits; calibrate the model first (configs/sft.py), or set "
                "config.finetune.policy=full"
            )
        start_run(workdir, config)
        split, labels, optimizer = trained_parts(model, config, updates)
        return cls(
            config,
            workdir,
            task,
            tokenizer,
            split,
            model.arch.layers,
            model.exit_layers,
            ModelFlops.of(model, full=config.lora.rank == 0),
            labels,
            optimizer,
            updates,
        )

    def prompts(self, step: int, rows: HostRows) -> PromptBatch:
        """Returns the training prompts of step `step` for the given rows of the batch."""
        return prompt_batch(
            self.task,
            self.tokenizer,
            split="train",
            seed=self.config.seed,
            step=step,
            batch_size=rows.total,
            max_prompt_tokens=self.config.task.max_prompt_tokens,
            skip_long=self.config.task.skip_long,
            rows=rows.index_B,
        )

    def packed_shapes(self, *, shared: bool) -> PackedShapes:
        """Returns the `PackedShapes` of this run.

        With `shared`, the completions of a prompt that are in the same row share one copy of it,
        except where attention is computed by `splash`, which does not support this.
        """
        config, new = self.config, getattr(self.config, self.config.command).max_new_tokens
        return PackedShapes(
            data_shards(),
            config.optim.accumulate,
            self.flops.arch.width,
            config.task.max_prompt_tokens + new,
            lambda length: shared and choose_attention(config.model.attention, length) != "splash",
        )

    def learning_rates(self, step: int, *, updates: int = 0) -> dict[str, Any]:
        """Returns the learning rates at training step `step` as metrics `lr/NAME`.

        A phase with a schedule of its own passes its number of steps as `updates`, and `step`
        counts from the start of the phase. With `updates` 0, the whole run's schedule applies.
        """
        optim, per_step = self.config.optim, 1 if updates else self.updates // self.config.steps
        peaks = {"base": optim.full_lr} if self.config.lora.rank == 0 else {"lora": optim.lora_lr}
        if self.config.command != "finetune":
            peaks |= {"exit": optim.exit_lr}
            if self.config.exits.continuation == "linear" and optim.continuation_lr:
                peaks["continuation"] = optim.continuation_lr
        return {
            f"lr/{name}": schedule(optim, peak, updates or self.updates)(step * per_step)
            for name, peak in peaks.items()
        }

    def measure_before(self) -> PolicyResult:
        """Measures the model before training, and writes the result to `before.json`.

        A resumed run reads `before.json` instead of measuring again.
        """
        path = self.workdir / "before.json"
        if not from_primary("before.json", path.exists()):
            before = self.measure(self.split.trainable)
            if is_primary():
                before.write(path)
        found = from_primary("before.json", read_json(path, REMEDY) if is_primary() else None)
        return checked(PolicyResult, found, str(path))

    def measure(self, trainable: Params) -> PolicyResult:
        """Measures the model with the trainable parameters `trainable`, under `self.policy`.

        The result contains accuracy, depth and compute on the evaluation split.
        """
        result = self._measured(trainable)[0]
        compute = self.flops.compute_fraction(result)
        return result.model_copy(update={"compute_fraction": compute})

    def initial_floor(self) -> AccuracyFloor:
        """Returns accuracy floors relative to the accuracy at full depth before training.

        Each floor is `rl.accuracy_floor` times a measured accuracy. The evaluation split is decoded
        twice: with the settings of rollouts, for the floor of rollouts, and with those of
        `config.eval`, for the floor of held-out problems. Raises UserError if no sampled answer is
        correct and there are penalties, which a floor of 0 would not withhold.
        """
        rl, evaluation = self.config.rl, self.config.eval
        sampled, _ = self._measured(
            self.split.trainable,
            policy="full",
            temperature=rl.temperature,
            max_new_tokens=rl.max_new_tokens,
        )
        if sampled.accuracy == 0 and (rl.depth_coef or rl.length_coef):
            raise UserError(
                f"the model answers none of {sampled.problems} problems of the {evaluation.split} "
                "split correctly at full depth, but the accuracy floor of the penalties is a "
                "fraction of that accuracy (config.rl.floor_of=initial); fine-tune the model first "
                "(configs/finetune.py), raise config.eval.problems, or set "
                "config.rl.floor_of=absolute"
            )
        measured, _ = self._measured(self.split.trainable, policy="full")
        floor = AccuracyFloor(
            rl.accuracy_floor * sampled.accuracy,
            rl.accuracy_floor * measured.accuracy,
            sampled.completion_length,
        )
        if is_primary():
            print(
                f"Accuracy at full depth before training is {sampled.accuracy:.1%} at temperature "
                f"{rl.temperature:g} and {measured.accuracy:.1%} at temperature "
                f"{evaluation.temperature:g}. The accuracy floor is {floor.rollouts:.1%} for "
                f"rollouts and {floor.held_out:.1%} for the {evaluation.split} split"
            )
        return floor

    def validation(self, state: TrainState, floor: float) -> dict[str, float]:
        """Returns metrics on the evaluation split, from which RL chooses the best checkpoint.

        `floor` is the accuracy floor for held-out problems.
        """
        result, made = self._measured(state.trainable)
        reward = penalised_reward(self.config.rl, floor, made, self.layers)
        names = ("accuracy", "depth_fraction", "layers_per_problem")
        return {f"val/{name}": getattr(result, name) for name in names} | {"val/reward": reward}

    def _measured(
        self, trainable: Params, *, policy: str = "", **decoding: float
    ) -> tuple[PolicyResult, list[Attempt]]:
        parts = self.split.decodable(trainable)
        decoder = make_decoder(self.config, parts, self.layers, self.tokenizer, **decoding)
        examination = Examination.of(self.task, self.tokenizer, self.config)
        return evaluate_policy(decoder, examination, policy or self.policy)

    @property
    def policy(self) -> str:
        """The policy of the run's measurements: in fine-tuning `finetune.policy`, else `sample`."""
        return self.config.finetune.policy if self.config.command == "finetune" else "sample"

    def finish(self, trainer: Trainer, state: TrainState, before: PolicyResult) -> None:
        """Ends a run: measures the model, writes `WORKDIR/model` from `state` and draws plots.

        Prints a table that compares the new measurement with `before`.
        """
        trainer.close()
        after = self.measure(state.trainable)
        student = self.split.student(state.trainable)
        if self.policy == "full":  # writes a model without exits, the base model of later stages
            merge_adapters(student)
            kept = {"with_exits": False}
        else:
            kept = {"base": "" if self.config.lora.rank == 0 else self.config.model.path}
        save_model(self.workdir / "model", student, self.tokenizer, overwrite=True, **kept)
        if not is_primary():
            return
        after.write(self.workdir / "after.json")
        temperature = self.config.eval.temperature
        tokens = f"tokens at temperature {temperature:g}" if temperature else "greedy tokens"
        how = {"full": "full depth", "sample": "sampled exits"}[self.policy]
        name, split = self.config.task.name, self.config.eval.split
        print_change(before, after, f"{name}, {split} split, {how}, {tokens}")
        print(f"Wrote {self.workdir / 'model'}")
        print(f"Drew {draw(self.workdir)}")
        memory = peak_memory()
        print(f"Peak memory: {', '.join(f'{gib:.2f} GiB ({n})' for n, gib in memory.items())}")


def trained_parts(
    model: Transformer, config: Config, updates: int
) -> tuple[SplitModel, Params, optax.GradientTransformation]:
    """Returns the split model, its labels and the optimiser of a run of `updates` updates.

    The commands are fine-tuning, which leaves exits as they are and needs no teacher, calibration
    and RL.
    """
    optim, finetunes = config.optim, config.command == "finetune"
    if finetunes:
        optim = dataclasses.replace(optim, exit_lr=0.0, continuation_lr=0.0)
    split, labels = split_for_training(
        model, optim, full=config.lora.rank == 0, keep_teacher=not finetunes
    )
    return split, labels, make_optimizer(optim, updates, labels)


def check_prompts(task: Task, tokenizer: Tokenizer, config: Config, positions: int) -> None:
    """Raises UserError if a prompt or a reference is too long for `config` or for the model.

    A prompt is too long if it exceeds `task.max_prompt_tokens`, or if it and the longest allowed
    completion together exceed the model's `positions`. In fine-tuning, a reference is too long if
    it exceeds `finetune.max_new_tokens`. Checks the held-out problems, and the training problems:
    all of a finite task, otherwise those of the first batch.
    """
    _, held_out_prompts = held_out(task, tokenizer, config, config.eval.problems)
    check_room(held_out_prompts, "eval", config.eval.max_new_tokens, positions)
    size = task.size("train")
    batch = prompt_batch(
        task,
        tokenizer,
        split="train",
        seed=config.seed,
        step=0,
        batch_size=config.batch_size if size is None else size,
        max_prompt_tokens=config.task.max_prompt_tokens,
        skip_long=config.task.skip_long,
    )
    limit = getattr(config, config.command).max_new_tokens
    check_room(batch.tokens, config.command, limit, positions)
    if config.command == "finetune":
        references_within(tokenizer, batch.problems, limit)
