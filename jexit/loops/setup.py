"""Makes models, tasks and decoders from a `Config`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jexit.config import TRAINED_UNDER, Config, Execution, TaskConfig
from jexit.data.loader import require_problems
from jexit.data.tokenizer import Tokenizer
from jexit.dist import place_parameter
from jexit.errors import UserError
from jexit.evaluation.decoder import Decoder
from jexit.io.model_dir import load
from jexit.io.model_source import open_model
from jexit.model.attention import check_attention
from jexit.model.policies import Sample
from jexit.model.transformer import Transformer
from jexit.tasks import Task, make_task
from jexit.tasks.base import Rewards


def load_model(config: Config, *, trains: bool) -> tuple[Transformer, Tokenizer]:
    """Loads the model and the tokenizer that `config` names.

    With `trains`, the model also gets the adapters of `config` and, except in fine-tuning, which
    trains no exits, the exit heads. Raises UserError if `trains` asks for full fine-tuning of a
    model that has adapters, if exits with a frozen continuation would get a linear one without
    calibration, or if the chat template does not support `config.task.system` and
    `config.task.thinking`.
    """
    model = config.model
    trained = {"lora": config.adapters} if trains else {}
    if trains and config.command != "finetune":
        trained["exit_head"] = config.exit_settings
    if trains and config.command == "rl" and config.exits.continuation == "linear":
        source = open_model(model.path)
        if source.exit_layers and source.exit_head.continuation == "frozen":
            raise UserError(
                f"config.exits.continuation is linear, but {model.path} has "
                "exits.continuation=frozen, and only calibration fits linear maps; set "
                "config.exits.continuation to frozen, or calibrate the model again (configs/sft.py)"
            )
    loaded, tokenizer = load(
        model.path,
        dtype=config.dtype,
        exit_layers=config.exits.layers,
        execution=execution_of(config),
        seed=config.seed,
        place=place_parameter,
        **trained,
    )
    if trains and config.lora.rank == 0 and loaded.lora is not None:
        raise UserError(
            f"{model.path} contains LoRA adapters of rank {loaded.lora.rank}, but "
            "config.lora.rank=0 trains the base weights themselves; merge the adapters first "
            "(python -m convert.to_hf --adapter=merge) or set "
            f"config.lora.rank={loaded.lora.rank}"
        )
    tokenizer.system, tokenizer.thinking = config.task.system, config.task.thinking
    return loaded, tokenizer


def execution_of(config: Config) -> Execution:
    """Returns `config.model.execution`; raises UserError if its attention cannot run here."""
    check_attention(config.model.attention)
    return config.model.execution


def with_trained_exits(config: Config) -> Config:
    """Returns `config` with the settings under which the exits of its model were trained.

    Settings that the model does not record stay as they are.
    """
    exits = vars(open_model(config.model.path).exit_head)
    sections = {}
    for section, names in TRAINED_UNDER.items():
        known = {name: exits[name] for name in names if exits[name] is not None}
        sections[section] = dataclasses.replace(getattr(config, section), **known)
    return dataclasses.replace(config, **sections)


def sample_policy(config: Config) -> Sample:
    """Returns the policy `sample` with `hazard_temperature` and `min_hazard` from `config.rl`."""
    rl = config.rl
    # NumPy numbers: to read an array on a device, the host would have to wait for the running step.
    return Sample(np.float32(rl.hazard_temperature), np.float32(rl.min_hazard))


def make_decoder(
    config: Config, parts: tuple[Any, ...], layers: int, tokenizer: Tokenizer, **changed: Any
) -> Decoder:
    """Returns a decoder with the settings of `config`, except those given in `changed`.

    `parts` is the model in the form of `SplitModel.decodable`, and `layers` its number of layers.
    """
    settings = {
        "sample": sample_policy(config),
        "size": config.engine,
        "temperature": config.eval.temperature,
        "max_new_tokens": config.eval.max_new_tokens,
        "seed": config.seed,
    }
    return Decoder(parts=parts, layers=layers, tokenizer=tokenizer, **settings | changed)


def load_task(config: TaskConfig, split: str) -> Task:
    """Returns the task that `config` names; raises UserError if the split `split` is empty."""
    rewards = Rewards(
        strict=config.reward_strict,
        lenient=config.reward_lenient,
        wrong=config.reward_wrong,
        none=config.reward_none,
    )
    if "rewards" in config.options:
        raise UserError(
            "config.task.options.rewards is set, but jexit makes a task's argument `rewards` from "
            "config.task.reward_strict, reward_lenient, reward_wrong and reward_none; set these, "
            "or give your task's own keyword another name"
        )
    task = make_task(config.name, config.path or None, rewards=rewards, **config.options)
    task.time_limit = config.time_limit
    require_problems(task, split)
    return task
