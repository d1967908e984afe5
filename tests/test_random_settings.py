"""Random settings, most of them absurd: each is a valid config or one sentence, in no time."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
import typing

import numpy as np
import pytest

from jexit.config import COMMANDS, Config
from jexit.errors import UserError
from jexit.main import main, parse
from small_runs import ROOT, parameters, saved_small_model, small_settings

CASES = 500

NUMBERS = [
    *["nan", "inf", "-inf", "1e400", "-1e400", "1e-400", "1e24", "1e-12", "1e999999999", "9" * 24],
    *["-0.0", "0", "1", "2", "3", "7", "-1", "-5", "0.5", "1.5", "256", "100000", "1_000", "0x10"],
    *["2**31", "2147483647", "2147483648", "4294967296", "9223372036854775808", "9" * 5000],
]
TEXTS = [
    *["", " ", "true", "False", "None", "null", "auto", "full", "best", "sums", "a/b", "../.."],
    *["threshold:nan", "threshold:0.5", "fixed:0", "fixed:99", "shuffled:shuffled:full", "-loss"],
    *["\0", "\ud800", "é", "\n", "'", '"', "x" * 5000, "-" + "9" * 400, "%s%n", "{0}", "~"],
]
LISTS = [
    *["()", "(1,)", "(1,2)", "(2,1)", "(1,1)", "(0,)", "(-1,)", "(1,'x')", "('q','q')", "('q',)"],
    *["[1,2]", "{}", "{1:2}", "(", ")", "1,2", "(nan,)", "(1e9,)", "('full','sample')", "((1,),)"],
    *["(" * 300, "(1," * 2000 + ")" * 2000, f"({'1,' * 5000})", f"('{'x' * 5000}',)", "('',)"],
    *["(None,)", "(True,)", "('shuffled',)", "lambda: 1", "__import__('os')", "9**9**9"],
]


def settings(cls=Config, prefix="", **options):
    """Every setting's key with its type."""
    for name, hint in typing.get_type_hints(cls, **options).items():
        if dataclasses.is_dataclass(hint):
            yield from settings(hint, f"{prefix}{name}.", **options)
        else:
            yield f"{prefix}{name}", hint


SETTINGS = dict(settings())
DECLARED = dict(settings(include_extras=True))


def misspelt(draw, key):
    place = draw.randrange(len(key))
    return draw.choice(
        [key[:place] + key[place + 1 :], f"{key}s", f"{key}.x", key.upper(), key[: place + 1] + key]
    )


def one_setting(draw, key):
    """KEY=VALUE with, by chance, a value of the key's own type or of any, or another key."""
    fitting = {int: NUMBERS, float: NUMBERS, bool: TEXTS, str: TEXTS}
    own = LISTS if typing.get_origin(SETTINGS[key]) is tuple else fitting.get(SETTINGS[key], TEXTS)
    value = draw.choice(own if draw.random() < 0.7 else [*NUMBERS, *TEXTS, *LISTS])
    return f"{misspelt(draw, key) if draw.random() < 0.1 else key}={value}"


def random_settings(number):
    """A command and the settings of one case; every key comes up in turn."""
    draw = random.Random(number)
    keys = list(SETTINGS)
    chosen = [keys[number % len(keys)], *draw.sample(keys, draw.choice([0, 0, 1, 2]))]
    given = [one_setting(draw, key) for key in chosen]
    return draw.choice(COMMANDS), given


def arguments(command, given):
    file = ROOT / "configs" / f"{command}.py"
    return ["jexit", f"--config={file}", *(f"--config.{setting}" for setting in given)]


def test_five_hundred_random_settings_are_each_a_config_or_one_sentence():
    taken = 0
    for number in range(CASES):
        given = arguments(*random_settings(number))
        began = time.process_time()
        try:
            config = parse(given).config
        except UserError as error:
            message = str(error)
            assert message and "\n" not in message and len(message) < 1000, (given, message)
        else:
            taken += 1
            assert Config.from_dict(config.to_dict()) == config, given
        assert time.process_time() - began < 1.0, given
    assert CASES / 20 < taken < CASES / 2  # both ways are tried
    tried = {setting.partition("=")[0] for n in range(CASES) for setting in random_settings(n)[1]}
    assert set(SETTINGS) <= tried


# From end to end

RUNS = 40
AS_COMMANDS = 5  # of them through an interpreter of their own
CPU_SECONDS = 30  # of processor time, which does not depend on what else the machine does
SMALL = {
    "checkpoint.every": 1,
    "eval.measures": (),
    "generate.max_new_tokens": 6,
    "log.tensorboard": False,
    "model.scan_unroll": 1,
    "pretrain.layers": 3,
    "pretrain.mlp_width": 24,
    "pretrain.width": 16,
    "sft.samples": 1,
    "steps": 3,
}
SECTIONS = {
    "pretrain": ("pretrain", "optim", "task", "checkpoint", "model"),
    "finetune": ("finetune", "optim", "task", "lora", "eval", "checkpoint"),
    "sft": ("sft", "optim", "task", "exit_head", "lora", "eval", "checkpoint"),
    "rl": ("rl", "optim", "task", "exit_head", "lora", "engine", "checkpoint", "log"),
    "eval": ("eval", "task", "engine", "exits", "rl"),
    "generate": ("generate", "engine", "exits", "rl", "model"),
}
# Whole numbers that cost nothing when they are large.
FREE = {"seed", "checkpoint.keep", "engine.rows", "generate.top_k", "optim.max_skipped"}
FREE |= {"optim.warmup_steps", "rl.warmup_steps", "log.samples", "log.samples_every"}


def extreme(draw, key):
    """KEY=VALUE at or near an end of what the key takes; large only where that is not long."""
    hint, kind = DECLARED[key], SETTINGS[key]
    if kind in (int, float):
        bounds = typing.get_args(hint)[1]
        ends = [bounds.at_least, bounds.at_most, bounds.at_least / 2 + bounds.at_most / 2]
        if kind is int and key not in FREE:
            ends = [bounds.at_least, bounds.at_least + 1, 3]
        return f"{key}={kind(draw.choice(ends))}"
    if typing.get_origin(kind) is typing.Literal:
        return f"{key}={draw.choice(typing.get_args(kind))}"
    if kind is bool:
        return f"{key}={draw.choice((True, False))}"
    return one_setting(draw, key)


def random_run(number, model_dir):
    """The arguments of a small run with a few of its settings at an extreme."""
    draw = random.Random(f"run {number}")
    command, small = COMMANDS[number % len(COMMANDS)], small_settings(model_dir) | SMALL
    keys = [key for key in SETTINGS if key.partition(".")[0] in SECTIONS[command]]
    keys = [key for key in keys if key not in small]
    optim = [key for key in keys if key.startswith("optim.") and SETTINGS[key] is float]
    chosen = ["seed", *draw.sample(optim, min(3, len(optim))), *draw.sample(keys, 3)]
    chosen = [extreme(draw, key) for key in chosen]
    if draw.random() < 0.2:
        chosen.append(one_setting(draw, draw.choice(keys)))
    return arguments(command, [*(f"{key}={value}" for key, value in small.items()), *chosen])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return saved_small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(RUNS))
def test_a_random_run_ends_well_or_with_one_sentence(number, model_dir, tmp_path, capfd):
    given = [*random_run(number, model_dir), f"--workdir={tmp_path / 'run'}"]
    before = sum(os.times()[:4])
    if number < AS_COMMANDS:
        limited = ["bash", "-c", f'ulimit -t {CPU_SECONDS}; exec "$0" "$@"', sys.executable]
        environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
        command = [*limited, "-m", "jexit.main", *given[1:]]
        code = subprocess.run(command, env=environment, check=False).returncode
    else:
        code = main(given)
    assert sum(os.times()[:4]) - before < CPU_SECONDS, given
    error = capfd.readouterr().err
    assert "Traceback" not in error, (given, error)
    said = [line for line in error.splitlines() if line.startswith("jexit: ")]
    assert (code, len(said)) in ((0, 0), (1, 1)), (given, error)
    model = tmp_path / "run" / "model"
    if code == 0 and model.exists():
        assert all(np.isfinite(array).all() for array in parameters(model).values())
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
            assert json.loads(line)["skipped"] or "null" not in line, (given, line)  # or NaN
    if code == 1 and "not finite" not in error:
        assert list(tmp_path.iterdir()) == [], (given, error)
    assert code == 0 or not model.exists()
