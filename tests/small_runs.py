"""Runs of every command on a random model that is small enough to train in seconds."""

import dataclasses
import json
import pathlib
import signal

import jax
import numpy as np
from flax import nnx

from jexit.config import TINY_PATH, Config, ExitSettings, config_dict
from jexit.data.tokenizer import Tokenizer
from jexit.io.model_dir import load, save_model
from jexit.loops import trainer
from jexit.main import dispatch
from jexit.model.transformer import Transformer
from jexit.presets import Architecture

ROOT = pathlib.Path(__file__).parents[1]

ARCHITECTURE = Architecture(
    family="qwen3",
    vocab_size=64,
    width=16,
    layers=3,
    query_heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_width=24,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tied=True,
    max_positions=256,
)
# The only metrics that two equal runs may differ in.
TIMES = {
    "step_seconds",
    "rollout_seconds",
    "tokens_per_second",
    "memory/host_peak_gib",
    "compilations",
}


def saved_small_model(path: pathlib.Path) -> pathlib.Path:
    """A model directory at `path`, with the shipped tokenizer and no adapters."""
    tokenizer = Tokenizer.load(ROOT / TINY_PATH)
    save_model(path, small_model(tokenizer.vocab_size), tokenizer)
    return path


def small_model(vocab_size: int) -> Transformer:
    arch = dataclasses.replace(ARCHITECTURE, vocab_size=vocab_size)
    # At its start a model predicts next to nothing: exits would have nothing to differ in.
    return random_model(arch, 0.2, exit_layers=(1, 2), exit_head=ExitSettings(bias=-1.0))


def random_model(arch: Architecture, scale: float, **settings) -> Transformer:
    """Every parameter moved at random from its start, whose zeros and ones hide what they do."""
    model = Transformer(arch, rngs=nnx.Rngs(0), **settings)

    def moved(path, value):
        seed = sum(map(ord, jax.tree_util.keystr(path)))
        return value + scale * jax.random.normal(jax.random.key(seed), value.shape, value.dtype)

    nnx.update(model, jax.tree_util.tree_map_with_path(moved, nnx.state(model)))
    return model


def make_config(command: str, model_dir: pathlib.Path, **settings) -> Config:
    """The command's defaults, cut down to the small model; `settings` as `rl__rollouts=3`."""
    config = config_dict(command)
    with config.unlocked():
        config.update_from_flattened_dict(small_settings(model_dir, **settings))
    return Config.from_dict(config)


def small_settings(model_dir: pathlib.Path, **settings) -> dict:
    """What differs from the defaults, by key."""
    small = {
        "model.path": str(model_dir),
        "exits.layers": (1, 2),
        "exit_head.bias": -1.0,
        "lora.rank": 2,
        "steps": 4,
        "batch_size": 4,
        "optim.lora_lr": 1e-2,
        "optim.exit_lr": 1e-2,
        "eval.problems": 6,
        "eval.max_new_tokens": 8,
        "rl.rollouts": 2,
        "rl.max_new_tokens": 8,
        "sft.pool": 6,
        "sft.generate_batch": 4,
        "sft.samples": 2,
        "sft.max_new_tokens": 8,
        "log.samples_every": 2,
        "log.samples": 2,
    }
    chosen = {key.replace("__", "."): value for key, value in settings.items()}
    if chosen.get("task.name", "sums") == "sums":
        small["task.options.operands_max"] = 4
    return small | chosen


def run(command: str, model_dir: pathlib.Path, workdir: pathlib.Path, **settings) -> None:
    """What `python -m jexit.main` does once its arguments are parsed."""
    dispatch(make_config(command, model_dir, **settings), workdir)


def metrics(workdir: pathlib.Path) -> list[dict]:
    """The rows of metrics.jsonl without wall-clock metrics."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def parameters(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Every parameter of a model directory by its dotted path."""
    model, _ = load(directory)
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(path): np.asarray(jax.device_get(leaf[...])) for path, leaf in state}


def assert_same_model(
    one: pathlib.Path, other: pathlib.Path, relative: float = 0.0, least: float = 0.0
) -> None:
    """Parameters of two model directories are equal, to the bit unless tolerances are given."""
    first, second = parameters(one), parameters(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, relative, least, err_msg=name)


def measured(workdir: pathlib.Path) -> list[dict]:
    """The results before and after a run, without wall-clock metrics."""
    results = [json.loads((workdir / f"{name}.json").read_text()) for name in ("before", "after")]
    return [{key: value for key, value in each.items() if key not in TIMES} for each in results]


def stop_after(monkeypatch, step: int) -> None:
    """Makes every trainer receive SIGTERM while it runs this step."""
    original = trainer.Trainer.run

    def run_and_stop(self, state, one_step):
        def interrupted(state, number):
            if number == step:
                signal.raise_signal(signal.SIGTERM)
            return one_step(state, number)

        return original(self, state, interrupted)

    monkeypatch.setattr(trainer.Trainer, "run", run_and_stop)
