"""Random settings, most of them absurd: each is a valid config or one sentence, in no time."""

import dataclasses
import pathlib
import random
import time
import typing

from jexit.config import COMMANDS, Config
from jexit.main import parse

ROOT = pathlib.Path(__file__).parent.parent
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
CONTRADICTIONS = [
    ("rl.dual_ascent=True", "rl.warmup_steps=3", "rl.accuracy_floor=0.5"),
    ("rl.dual_ascent=True",),
    ("rl.updates_per_batch=2", "rl.importance_cap=2.0"),
    ("checkpoint.final=best", "checkpoint.keep_best=0"),
    ("batch_size=7", "optim.accumulate=2"),
    ("mesh.data=3", "batch_size=4"),
    ("lora.rank=0", "sft.target=student"),
    ("pretrain.tom=0.7", "pretrain.word_problems=0.7"),
    ("task.name=gsm8k", "task.steps=3"),
    ("task.people_min=2", "task.moves_max=8"),
    ("batch_size=100000", "rl.rollouts=10000"),
    ("eval.problems=100000", "eval.max_new_tokens=1000000"),
    ("pretrain.width=1000000", "pretrain.mlp_width=1000000"),
    ("eval.policies=('shuffled','sample')",),
]


def settings(cls=Config, prefix=""):
    """Every setting's key with its plain type."""
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from settings(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


SETTINGS = dict(settings())


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
    if draw.random() < 0.2:
        given += draw.choice(CONTRADICTIONS)
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
        except ValueError as error:
            message = str(error)
            assert message and "\n" not in message and len(message) < 1000, (given, message)
        else:
            taken += 1
            assert Config.from_dict(config.to_dict()) == config, given
        assert time.process_time() - began < 1.0, given
    assert CASES / 20 < taken < CASES / 2  # both ways are tried


def test_random_settings_try_every_setting():
    tried = {setting.partition("=")[0] for n in range(CASES) for setting in random_settings(n)[1]}
    assert set(SETTINGS) <= tried
