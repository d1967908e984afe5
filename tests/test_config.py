"""Every setting is checked by name, by type and against the others, in one sentence."""

import dataclasses
import json
import math
import operator
import typing
from typing import Annotated, Literal

import pytest

from jexit import axes
from jexit.bounds import Bounds, Length
from jexit.config import (
    COMMANDS,
    PROJECTIONS,
    Config,
    check_exits,
    config_dict,
    control_of,
    parse_policy,
)
from jexit.presets import PRESETS, Architecture, Llama3Rope, Yarn
from jexit.sections import STEPS, TINY_PATH
from jexit.tasks import sums, tom
from jexit.tasks.word_problems import NAMES


def build(command="rl", **settings):
    """A config from `rl__rollouts=3` and the like, as a parsed file would give it."""
    values = Config(command=command).to_dict()
    for key, value in settings.items():
        *parents, name = key.split("__")
        place = values
        for parent in parents:
            place = place[parent]
        place[name] = value
    return Config.from_dict(values)


def declared(cls=Config, prefix=""):
    """Every setting with its annotation."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from declared(hint, f"{prefix}{name}__")
        else:
            yield f"{prefix}{name}", hint


def leaves():
    """Every setting with its type."""
    for key, hint in declared():
        yield key, typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def default(key):
    return operator.attrgetter(key.replace("__", "."))(Config(command="rl"))


# Presets and defaults


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("preset", ["tiny", *PRESETS])
def test_every_preset_builds_for_every_command(command, preset):
    config = Config.from_dict(config_dict(command, preset))
    assert (config.command, config.preset) == (command, preset)
    if preset == "tiny":
        assert config.model.path == TINY_PATH
    else:
        layers = PRESETS[preset].architecture.layers
        assert config.exits.layers == tuple(range(5, layers, 5))
        assert check_exits(config.exits.layers, layers) == config.exits.layers
        assert config.lora.rank == PRESETS[preset].lora_rank


def test_the_promised_presets_exist():
    sizes = {
        "qwen3": ("0.6b", "1.7b", "4b", "8b", "14b", "32b"),
        "qwen2.5": ("0.5b", "1.5b", "3b", "7b"),
        "r1-distill-qwen": ("1.5b", "7b", "14b", "32b"),
        "smollm2": ("135m", "360m", "1.7b"),
        "llama-3.2": ("1b",),
        "layerskip-llama-3.2": ("1b",),
    }
    assert set(PRESETS) == {f"{family}-{size}" for family in sizes for size in sizes[family]}


@pytest.mark.parametrize(
    ("preset", "billions"),
    # Totals of the published checkpoints' safetensors headers, in parameters.
    [
        ("qwen2.5-0.5b", 0.494032768),
        ("qwen3-0.6b", 0.596049920),
        ("r1-distill-qwen-1.5b", 1.777088000),
        ("qwen3-4b", 4.022468096),
        ("qwen2.5-7b", 7.615616512),
        ("qwen3-32b", 32.762123264),
        ("smollm2-135m", 0.134515008),
        ("smollm2-360m", 0.361821120),
        ("smollm2-1.7b", 1.711376384),
        ("llama-3.2-1b", 1.235814400),
        ("layerskip-llama-3.2-1b", 1.235814400),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, billions):
    a = PRESETS[preset].architecture
    heads, kv = a.query_heads * a.head_dim, a.kv_heads * a.head_dim
    block = a.width * (2 * heads + 2 * kv) + 3 * a.width * a.mlp_width + 2 * a.width
    block += (heads + 2 * kv) * a.qkv_bias + 2 * a.head_dim * a.qk_norm
    embeddings = a.vocab_size * a.width * (1 if a.tied else 2)
    assert a.layers * block + embeddings + a.width == round(billions * 1e9)


def test_published_lora_settings():
    small, large = (config_dict("sft", p) for p in ("r1-distill-qwen-1.5b", "qwen3-4b"))
    assert (small.lora.rank, small.lora.alpha, small.lora.dropout) == (8, 16.0, 0.05)
    assert (large.lora.rank, large.lora.alpha, large.lora.dropout) == (16, 32.0, 0.05)
    assert Config(command="sft").lora.targets == ("q", "k", "v", "o")
    assert Config(command="rl").optim.lora_lr == 1e-4
    assert Config(command="rl").optim.exit_lr == 1e-5


def test_an_unknown_preset_or_command_lists_the_known():
    with pytest.raises(ValueError, match=r"preset 'qwen9' is not known; choose one of tiny, qwen3"):
        config_dict("rl", "qwen9")
    with pytest.raises(ValueError, match=r"preset '\.\./x' is not known; choose one of tiny, qw"):
        build(preset="../x")  # which names a workdir
    with pytest.raises(
        ValueError, match="command 'train' is not one of pretrain, finetune, sft, rl"
    ):
        config_dict("train")


def test_a_parsed_config_is_locked_and_typed():
    config = config_dict("rl")
    with pytest.raises(AttributeError):
        config.rl.rolouts = 3
    with pytest.raises(TypeError):
        config.rl.rollouts = "many"


def test_a_config_survives_json():
    config = build(exits__layers=(2, 4), eval__policies=("full", "fixed:3"))
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_architecture_survives_json():
    arch = PRESETS["qwen3-4b"].architecture
    yarn = Yarn(factor=2.0, original_max_positions=64)
    llama3 = Llama3Rope(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
    )
    for scaling in (None, yarn, llama3):
        arch = dataclasses.replace(arch, rope_scaling=scaling)
        assert Architecture.from_dict(json.loads(json.dumps(arch.to_dict()))) == arch


@pytest.mark.parametrize("yarn", [None, {"factor": 2.0, "original_max_positions": 64}])
def test_an_architecture_that_names_its_scaling_yarn_is_read(yarn):
    """As model directories had it before there was a second kind."""
    arch = PRESETS["qwen3-4b"].architecture
    values = {k: v for k, v in arch.to_dict().items() if k != "rope_scaling"}
    scaling = Yarn(**yarn) if yarn else None
    read = Architecture.from_dict({**values, "yarn": yarn})
    assert read == dataclasses.replace(arch, rope_scaling=scaling)


# Keys and types


@pytest.mark.parametrize(
    ("key", "where"),
    [("rolouts", "config"), ("rl__rolouts", "config.rl"), ("model__dtpye", "config.model")],
)
def test_an_unknown_key_is_refused_with_the_known_ones(key, where):
    name = key.split("__")[-1]
    with pytest.raises(ValueError, match=rf"^{where}\.{name} does not exist; {where} has \w+, "):
        build(**{key: 1})


@pytest.mark.parametrize("key", [key for key, _ in leaves()])
def test_a_value_of_the_wrong_type_is_refused_by_name(key):
    with pytest.raises(ValueError, match=rf"^config\.{key.replace('__', '.')} is ") as caught:
        build(**{key: {"a": 1}})
    assert "choose one of" in str(caught.value) or "must be of type" in str(caught.value)


@pytest.mark.parametrize("key", [key for key, hint in leaves() if hint in (int, float)])
@pytest.mark.parametrize("value", ["1", None, True])
def test_numbers_are_numbers(key, value):
    with pytest.raises(ValueError, match=r"must be of type (int|float)"):
        build(**{key: value})


@pytest.mark.parametrize("key", [key for key, hint in leaves() if hint is int])
def test_counts_are_whole(key):
    with pytest.raises(ValueError, match=r"is 2\.5; it must be of type int"):
        build(**{key: 2.5})


def test_what_means_the_same_is_taken():
    config = build(optim__lora_lr=1, exits__layers=[2, 3], lora__targets="q")
    assert config.optim.lora_lr == 1.0 and isinstance(config.optim.lora_lr, float)
    assert config.exits.layers == (2, 3)
    assert config.lora.targets == ("q",)
    with pytest.raises(ValueError, match=r"config\.exits\.layers is 'x'; it must be of type int"):
        build(exits__layers=(1, "x"))


def test_a_section_is_no_value():
    with pytest.raises(
        ValueError, match=r"config\.rl is 3; it holds settings: set config\.rl\.KEY"
    ):
        build(rl=3)


def test_the_command_is_needed():
    with pytest.raises(
        ValueError, match=r"config\.command is missing; choose one of pretrain, finetune, sft"
    ):
        Config.from_dict({"seed": 1})
    with pytest.raises(ValueError, match=r"config\.command is 'train'; choose one of pretrain"):
        Config.from_dict({"command": "train"})


# Contradictions


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"rl__rollouts": 1},
            "RLOO needs at least 2 rollouts per prompt, got 1; raise config.rl.r",
        ),
        ({"rl__temperature": 0.0}, r"config\.rl\.temperature is 0\.0; it must be at least 1e-06"),
        ({"rl__min_hazard": 1.0}, r"config\.rl\.min_hazard is 1\.0; it must be at least 0 and at"),
        ({"rl__dual_ascent": True}, r"dual_ascent needs a floor to hold; set config\.rl\.accuracy"),
        (
            {"batch_size": 10, "optim__accumulate": 4},
            "batch_size 10 does not divide into optim.acc",
        ),
        ({"exits__layers": (2, 2)}, r"config\.exits\.layers is \(2, 2\); exits are distinct"),
        ({"exits__layers": (4, 2)}, "in rising order"),
        ({"exits__layers": (0, 2)}, r"config\.exits\.layers is 0; it must be at least 1"),
        ({"mesh__fsdp": 0}, r"config\.mesh\.fsdp is 0; it must be at least 1"),
        ({"mesh__fsdp": 5}, r"192 rows, which do not divide over config\.mesh\.data 1 × fsdp 5"),
        ({"lora__targets": ("q", "x")}, "config.lora.targets names 'x'; choose among q, k, v"),
        ({"lora__dropout": 1.0}, r"config\.lora\.dropout is 1\.0; it must be at least 0 and at"),
        ({"sft__explore": 1.5}, r"config\.sft\.explore is 1\.5; it must be at least 0 and at m"),
        (
            {"task__steps": "fine"},
            r"task\.steps is 'fine'; task 'sums' knows free, 2, 3, 4, 5, at_once",
        ),
        (
            {"task__name": "tom", "task__steps": "3"},
            r"config\.task\.steps is '3'; task 'tom' knows free, fine, coarse, at_once, mixed",
        ),
        (
            {"task__name": "tom", "task__path": "stories.csv", "task__steps": "fine"},
            "steps is 'fine'; task 'tom' with a path knows free",
        ),
        ({"task__name": "gsm8k", "task__steps": "3"}, "steps is '3'; task 'gsm8k' knows free"),
        ({"task__name": "blend", "task__steps": "3"}, "'blend' knows free, at_once, mixed"),
        (
            {"task__parts": ("sums", "gsm8k")},
            "parts names 'gsm8k'; a blend is of sums, word_problems, tom",
        ),
        ({"pretrain__tom": -0.1}, r"config\.pretrain\.tom is -0\.1; it must be at least 0 and at"),
        (
            {"pretrain__tom": 0.6, "pretrain__word_problems": 0.5},
            r"config\.pretrain\.word_problems and tom add up to 1\.1; they are shares of the text",
        ),
        ({"eval__policies": ("full", "half")}, "policy 'half' is not known; use full, sample"),
        ({"generate__policy": "fixed:0"}, "policy 'fixed:0' is not known"),
        ({"checkpoint__final": "best"}, r"kept for being the best; set config\.checkpoint\.keep_b"),
        ({"checkpoint__final": "first"}, r"final is 'first'; choose one of last, best"),
        ({"checkpoint__keep_best": -1}, r"config\.checkpoint\.keep_best is -1; it must be at"),
        (
            {"checkpoint__best_metric": "rewards"},
            r"best_metric is 'rewards'; choose among val/reward, .*, with a '-' before",
        ),
        ({"eval__split": "test"}, r"split is 'test' in a run that trains, .* set it to val here"),
        ({"checkpoint__keep": 0}, r"config\.checkpoint\.keep is 0; it must be at least 1"),
    ],
)
def test_a_contradiction_is_one_sentence(settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        build("rl", **settings)
    assert "\n" not in str(caught.value)


def test_sampled_losses_have_no_weight_of_staying():
    settings = config_dict("sft")
    settings.sft.stay_weight, settings.sft.exit_loss = 9.0, "sampled"
    with pytest.raises(
        ValueError, match=r"stay_weight is 9 and .*exit_loss=expected or .*stay_weight=1"
    ):
        Config.from_dict(settings)
    settings.sft.exit_loss = "expected"
    assert Config.from_dict(settings).sft.stay_weight == 9.0


def test_explored_depths_are_no_targets_for_sampled_losses():
    settings = config_dict("sft")
    settings.sft.explore, settings.sft.exit_loss = 0.5, "sampled"
    with pytest.raises(
        ValueError, match=r"explore is 0\.5 and .*exit_loss=expected or .*explore=0"
    ):
        Config.from_dict(settings)
    settings.sft.explore = 0.0
    assert Config.from_dict(settings).sft.exit_loss == "sampled"


def test_the_steps_that_a_config_takes_are_those_of_the_tasks():
    modes = {"sums": sums.STEP_MODES, "tom": tom.STEP_MODES}
    modes["blend"] = set(modes["sums"]) & set(modes["tom"])
    assert {name: set(known) for name, known in STEPS.items()} == {
        name: set(map(str, known)) for name, known in modes.items()
    }
    for name, known in STEPS.items():
        for steps in known:
            build(task__name=name, task__steps=steps)


def test_no_steps_are_for_the_first_phase_of_calibration_alone():
    assert build(command="sft", steps=0, sft__lens_steps=5).steps == 0
    for settings in ({}, {"command": "sft"}, {"command": "rl", "sft__lens_steps": 5}):
        with pytest.raises(ValueError, match=r"config\.steps is 0, .*; it must be at least 1"):
            build(steps=0, **settings)


@pytest.mark.parametrize(
    ("key", "value", "least"),
    [
        ("batch_size", 0, 1),
        ("lora__rank", -1, 0),
        ("optim__accumulate", 0, 1),
        ("optim__max_skipped", 0, 1),
        ("optim__lora_lr", -1e-4, 0),
        ("optim__exit_lr", float("nan"), 0),
        ("task__max_prompt_tokens", 0, 1),
        ("task__shots", -1, 0),
        ("sft__samples", 0, 1),
        ("sft__pool", 0, 1),
        ("sft__generate_batch", 0, 1),
        ("rl__updates_per_batch", 0, 1),
        ("rl__max_new_tokens", 0, 1),
        ("eval__max_new_tokens", 0, 1),
        ("eval__problems", 0, 1),
        ("engine__rows", -1, 0),
        ("checkpoint__every", -1, 0),
        ("checkpoint__keep", 0, 1),
        ("log__samples_every", 0, 1),
        ("sft__sharpness", 0.0, 1e-06),
        ("rl__length_ref", 0.0, 1),
        ("rl__clip", 0.0, 1e-06),
        ("optim__clip_norm", 0.0, 1e-06),
        ("optim__eps", 0.0, 1e-16),
    ],
)
def test_what_would_divide_by_zero_or_never_end_is_refused(key, value, least):
    name = key.replace("__", ".")
    with pytest.raises(
        ValueError, match=rf"config\.{name} is {value}; it must be at least {least}"
    ):
        build(**{key: value})
    if value == value:
        build(**{key: least})


def test_every_setting_declares_what_it_takes():
    """A number its bounds, a text or tuple its length: a new setting cannot forget them."""
    for key, hint in declared():
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if hint is bool or origin is Literal:
            continue
        assert origin is Annotated, f"{key} declares neither bounds nor a length"
        if args[0] in (int, float):
            assert isinstance(args[1], Bounds), key
            assert math.isfinite(args[1].at_least) and math.isfinite(args[1].at_most), key
        else:
            assert isinstance(args[1], Length), key
        args[1].check(default(key), key)


NUMBERS = {
    key: typing.get_args(hint)
    for key, hint in declared()
    if typing.get_args(hint) and typing.get_args(hint)[0] in (int, float)
}


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_out_of_bounds_is_refused(key):
    kind, bounds = NUMBERS[key]
    outside = [bounds.at_least - 1, bounds.at_most + 1, -(10**24), 10**24]
    if kind is float:
        outside += [math.nan, math.inf, -math.inf]
    for value in outside:
        rule = f"at least {bounds.at_least} and at most {bounds.at_most}"
        message = f"config.{key.replace('__', '.')} is {kind(value)}; it must be (0, or )?{rule}"
        with pytest.raises(ValueError, match=f"^{message.replace('+', '.')}$"):
            build(**{key: value})


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        (Bounds(1, 3), (1, 2, 3), (0, 4, math.nan, math.inf)),
        (Bounds(0.5, 1, or_zero=True), (0, 0.5, 1), (0.4, -1, 1.1, math.nan, -math.inf)),
    ],
)
def test_bounds_include_their_ends(bounds, inside, outside):
    for value in inside:
        bounds.check(value, "x")
    for value in outside:
        with pytest.raises(ValueError, match=r"^x is .*; it must be .*at least"):
            bounds.check(value, "x")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": 10**5000}, "config.seed is a number of thousands of digits; it must be at"),
        ({"optim__lora_lr": 10**400}, "config.optim.lora_lr is 1000.*…; it is too large"),
        ({"model__path": "x" * 5000}, "'xxx.*… with 5000 characters; it must have at most 1000"),
        ({"model__path": "a\0b"}, r"'a\\x00b'; it must be text, in UTF-8 and without NUL"),
        ({"generate__prompts": ("\ud800",)}, "it must be text, in UTF-8 and without NUL"),
        ({"exits__layers": (1,) * 2000}, "with 2000 values; it must have at most 1000"),
        ({"eval__policies": ["full"] * 101}, "with 101 values; it must have at most 100"),
        ({"eval__measured": ["x" * 500]}, "is .'xxx.*…; it must be of type str"),
    ],
)
def test_what_is_too_long_is_refused_and_not_repeated(settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        build(**settings)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("command", "settings", "words"),
    [
        (
            "rl",
            {"batch_size": 100_000, "rl__rollouts": 11},
            "config.batch_size × rl.rollouts is 100000 × 11 = 1100000; together it must",
        ),
        ("rl", {"rl__max_new_tokens": 10**6, "batch_size": 1000}, "× rl.max_new_tokens is 1000 ×"),
        (
            "eval",
            {"eval__problems": 10**5, "eval__max_new_tokens": 10**5},
            "eval.problems × eval.max_",
        ),
        ("sft", {"sft__generate_batch": 10**5, "sft__max_new_tokens": 10**6}, "sft.generate_ba"),
        ("pretrain", {"batch_size": 10**5, "pretrain__length": 10**6}, "batch_size × pretrain.le"),
        ("pretrain", {"pretrain__width": 10**6, "pretrain__layers": 100}, "parameters in the bl"),
        ("rl", {"task__people_min": 2, "task__moves_max": 8}, "so few people rarely make so long"),
    ],
)
def test_what_is_too_large_only_together_is_refused(command, settings, words):
    with pytest.raises(ValueError, match=words):
        build(command, **settings)


def test_stories_have_as_many_people_as_there_are_names():
    assert NUMBERS["task__people_max"][1].at_most == len(NAMES)


def test_rules_of_rl_bind_rl_only():
    assert build("sft", rl__rollouts=1).rl.rollouts == 1


# Exits and policies


@pytest.mark.parametrize(
    ("exits", "layers", "expected"),
    [((), 24, (5, 10, 15, 20)), ((), 6, (5,)), ((1, 3), 4, (1, 3)), ([2], 3, (2,))],
)
def test_exits_default_to_every_fifth_layer(exits, layers, expected):
    assert check_exits(exits, layers) == expected


def test_exits_lie_below_the_last_layer():
    with pytest.raises(ValueError, match=r"exit 8 is not below the model's 8 layers; .* 1 to 7"):
        check_exits((4, 8), 8)
    with pytest.raises(
        ValueError, match=r"5 layers has no exit at every 5th layer; set config\.ex"
    ):
        check_exits((), 5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("full", ("full", None)),
        ("sample", ("sample", None)),
        ("threshold:0.5", ("threshold", 0.5)),
        ("fixed:6", ("fixed", 6)),
    ],
)
def test_policies_have_a_name_and_sometimes_a_number(text, expected):
    assert parse_policy(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Full",
        "full:3",
        "sample:0.5",
        "threshold",
        "threshold:0",
        "threshold:1",
        "threshold:nan",
        "threshold:x",
        "fixed",
        "fixed:0",
        "fixed:-1",
        "fixed:2.5",
        "greedy",
    ],
)
def test_other_policies_are_refused_with_the_known_ones(text):
    with pytest.raises(
        ValueError, match=r"policy '.*' is not known; use full, sample, threshold:X"
    ):
        parse_policy(text)


@pytest.mark.parametrize(
    ("text", "of"),
    [
        ("shuffled", "sample"),
        ("fixed:matched", "sample"),
        ("shuffled:threshold:0.5", "threshold:0.5"),
        ("fixed:matched:fixed:3", "fixed:3"),
        ("fixed:4", None),
        ("sample", None),
        ("shuffledness", None),
    ],
)
def test_a_control_names_what_it_controls(text, of):
    assert control_of(text) == of


# Axes


def test_the_suffix_of_every_array_type_says_its_axes():
    for name in axes.__all__:
        dims = getattr(getattr(axes, name), "dim_str", None)
        if dims:
            assert name.endswith(dims.replace(" ", "")), (name, dims)


def test_every_projection_can_be_adapted():
    assert build(lora__targets=PROJECTIONS).lora.targets == PROJECTIONS
