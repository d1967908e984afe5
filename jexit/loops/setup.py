"""Models and tasks from a config."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jexit.config import Config, Execution, TaskConfig
from jexit.data.loader import require_problems
from jexit.data.tokenizer import Tokenizer
from jexit.dist import place_parameter
from jexit.errors import UserError
from jexit.evaluation.decoder import Decoder
from jexit.io.model_dir import load
from jexit.io.workdir import trained_law
from jexit.model.attention import check_attention
from jexit.model.policies import Sample
from jexit.model.transformer import Transformer
from jexit.tasks import Task, make_task
from jexit.tasks.base import Rewards


def load_model(config: Config, *, trains: bool) -> tuple[Transformer, Tokenizer]:
    """The config's model; when it will be trained, with the config's adapters and exits.

    The tokenizer writes prompts as `config.task.system` and `config.task.thinking` say.
    """
    settings: dict[str, Any] = {}
    if trains:
        settings = {"exit_head": config.exit_settings, "lora": config.adapters}
    model = config.model
    loaded, tokenizer = load(
        model.path,
        dtype=model.dtype,
        exit_layers=config.exits.layers,
        execution=execution_of(config),
        seed=config.seed,
        place=place_parameter,
        **settings,
    )
    if trains and config.lora.rank == 0 and loaded.lora is not None:
        raise UserError(
            f"{model.path} holds LoRA adapters of rank {loaded.lora.rank} and config.lora.rank=0 "
            "trains the trunk itself; merge them first (python -m convert.to_hf --adapter=merge) "
            f"or set config.lora.rank={loaded.lora.rank}"
        )
    set_chat_format(tokenizer, config.task)
    return loaded, tokenizer


def set_chat_format(tokenizer: Tokenizer, config: TaskConfig) -> None:
    """Has the tokenizer write prompts as the config says; UserError where its template cannot."""
    tokenizer.system, tokenizer.thinking = config.system, config.thinking


def execution_of(config: Config) -> Execution:
    """How the model is computed; raises UserError for an attention that cannot run here."""
    check_attention(config.model.attention)
    return config.model.execution


def with_trained_exits(config: Config) -> Config:
    """The config with what the exits of its model were trained under, if that is a run's."""
    trained = {
        section: dataclasses.replace(getattr(config, section), **values)
        for section, values in trained_law(config.model.path).items()
    }
    return dataclasses.replace(config, **trained)


def sample_policy(config: Config) -> Sample:
    """How tokens leave under `sample`: with the temperature and the floor of `config.rl`."""
    rl = config.rl
    # NumPy's: an array on a device could only be read after the step that it is busy with.
    return Sample(np.float32(rl.hazard_temperature), np.float32(rl.min_hazard))


def make_decoder(
    config: Config, parts: tuple[Any, ...], layers: int, tokenizer: Tokenizer, **changed: Any
) -> Decoder:
    """Decodes the split model as `config.eval` says, but for what is `changed`."""
    settings = {
        "law": sample_policy(config),
        "size": config.engine,
        "temperature": config.eval.temperature,
        "max_new_tokens": config.eval.max_new_tokens,
        "seed": config.seed,
    }
    return Decoder(parts=parts, layers=layers, tokenizer=tokenizer, **settings | changed)


def load_task(config: TaskConfig, split: str) -> Task:
    """The config's task; raises UserError when the split that is needed is empty."""
    rewards = Rewards(
        strict=config.reward_strict,
        lenient=config.reward_lenient,
        wrong=config.reward_wrong,
        none=config.reward_none,
    )
    task = make_task(config.name, config.path or None, rewards=rewards, **config.options)
    task.time_limit = config.time_limit
    require_problems(task, split)
    return task
