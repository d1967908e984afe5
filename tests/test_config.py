"""Every setting is explained, checked by name and type, and against the others, in one sentence."""

import dataclasses
import importlib
import json
import math
import operator
import runpy
import typing
from typing import Annotated, Literal

import pytest

from jexit import axes
from jexit.config import (
    COMMANDS,
    Config,
    EngineSize,
    ExitSettings,
    LoRA,
    check_exits,
    config_dict,
    control_of,
    parse_policy,
)
from jexit.errors import UserError
from jexit.presets import PRESETS, Architecture, Yarn
from jexit.settings import Length, annotations
from small_runs import ROOT


def build(command="rl", /, **settings):
    """A config from `rl__rollouts=3` and the like, as a parsed file would give it."""
    values = Config(command=command).to_dict()
    for key, value in settings.items():
        *parents, name = key.split("__")
        place = values
        for parent in parents:
            place = place[parent]
        place[name] = value
    return Config.from_dict(values)


def refusal(command="rl", /, **settings):
    with pytest.raises(UserError) as caught:
        build(command, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def declared(cls=Config, prefix=""):
    """Every setting with its annotation."""
    for name, hint in annotations(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from declared(hint, f"{prefix}{name}__")
        else:
            yield f"{prefix}{name}", hint


SETTINGS = dict(declared())


def test_every_config_file_builds_for_every_preset():
    for command in COMMANDS:
        get_config = importlib.import_module(f"configs.{command}").get_config
        for name in ("tiny", *PRESETS):
            config = Config.from_dict(get_config(name))
            assert (config.command, config.preset) == (command, name)
            assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for name, preset in PRESETS.items():
        config = config_dict("rl", name)
        assert config.exits.layers == tuple(range(5, preset.architecture.layers, 5))
        assert config.lora.rank == preset.lora_rank
    large = config_dict("sft", "qwen3-4b").lora
    assert (large.rank, large.alpha, large.dropout) == (16, 32.0, 0.05)  # as published
    optim = Config(command="rl").optim
    assert (optim.lora_lr, optim.exit_lr) == (1e-4, 1e-5)  # as published


def test_presets_have_the_published_number_of_parameters():
    """Totals of the published checkpoints' safetensors headers, in billions."""
    published = {
        "qwen2.5-0.5b": 0.494032768, "qwen3-0.6b": 0.596049920, "r1-distill-qwen-1.5b": 1.777088000,
        "qwen3-4b": 4.022468096, "qwen2.5-7b": 7.615616512, "qwen3-32b": 32.762123264,
        "smollm2-135m": 0.134515008, "smollm2-360m": 0.361821120, "smollm2-1.7b": 1.711376384,
        "llama-3.2-1b": 1.235814400, "layerskip-llama-3.2-1b": 1.235814400,
    }  # fmt: skip
    for preset, billions in published.items():
        a = PRESETS[preset].architecture
        heads, kv = a.query_heads * a.head_dim, a.kv_heads * a.head_dim
        block = a.width * (2 * heads + 2 * kv) + 3 * a.width * a.mlp_width + 2 * a.width
        block += (heads + 2 * kv) * a.qkv_bias + 2 * a.head_dim * a.qk_norm
        embeddings = a.vocab_size * a.width * (1 if a.tied else 2)
        assert a.layers * block + embeddings + a.width == round(billions * 1e9), preset


def test_architectures_survive_json():
    arch = PRESETS["qwen3-4b"].architecture
    yarn = Yarn(factor=2.0, original_max_positions=64)
    llama3 = PRESETS["llama-3.2-1b"].architecture.rope_scaling
    for scaling in (None, yarn, llama3):
        scaled = dataclasses.replace(arch, rope_scaling=scaling)
        assert Architecture.from_dict(json.loads(json.dumps(scaled.to_dict()))) == scaled
    # As the first model directories name it.
    values = {k: v for k, v in arch.to_dict().items() if k != "rope_scaling"}
    values["yarn"] = {"factor": 2.0, "original_max_positions": 64}
    assert Architecture.from_dict(values) == dataclasses.replace(arch, rope_scaling=yarn)


def test_the_page_of_settings_is_current():
    """Every setting has a sentence on it; `python docs/configuration.py` writes it anew."""
    page = runpy.run_path(str(ROOT / "docs" / "configuration.py"))["page"]()
    assert (ROOT / "docs" / "configuration.md").read_text("utf-8") == page
    for key in SETTINGS:
        (row,) = (
            line for line in page.splitlines() if line.startswith(f"| `{key.replace('__', '.')}`")
        )
        assert len(row.split(" | ")[-1]) > 8, row


def test_a_key_or_a_value_of_the_wrong_type_is_refused_by_name():
    for key, where in (("rolouts", "config"), ("rl__rolouts", "config.rl")):
        said = refusal(**{key: 1})
        assert said.startswith(f"{where}.rolouts does not exist; use one of the keys ")
    for key, hint in SETTINGS.items():
        name = f"config.{key.replace('__', '.')} is "
        if key == "task__options":  # whose keys are a task's own
            assert refusal(task__options=3) == (
                f"{name}3, but it must be a mapping from names of settings to values, such as "
                "{'steps': 3}; correct it"
            )
            continue
        said = refusal(**{key: {"a": 1}})
        assert said.startswith(name) and ("choose one of" in said or "must be of type" in said)
        kind = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
        if kind in (int, float):
            for value in ("1", None, True, *([2.5] if kind is int else [])):
                assert f"must be of type {kind.__name__}" in refusal(**{key: value})
    assert (
        refusal(rl=3) == "config.rl is 3, but it must be a group of settings; set single ones, "
        "such as config.rl.KEY"
    )
    with pytest.raises(UserError, match=r"config\.command is missing, but it must be one of pretr"):
        Config.from_dict({"seed": 1})
    for call in (lambda: config_dict("rl", "qwen9"), lambda: build(preset="qwen9")):
        with pytest.raises(UserError, match="preset 'qwen9' is not known; choose one of tiny, qw"):
            call()
    with pytest.raises(AttributeError):
        config_dict("rl").rl.rolouts = 3
    config = build(optim__lora_lr=1, exits__layers=[2, 3], lora__targets="q")  # mean the same
    assert isinstance(config.optim.lora_lr, float) and config.exits.layers == (2, 3)
    assert config.lora.targets == ("q",)


def test_every_setting_declares_what_it_takes_and_holds_to_it():
    """A number its bounds, a text or tuple its length: a new setting cannot forget them."""
    for key, hint in SETTINGS.items():
        if hint is bool or typing.get_origin(hint) is Literal:
            continue
        assert typing.get_origin(hint) is Annotated, key
        kind, rule = typing.get_args(hint)
        rule.check(operator.attrgetter(key.replace("__", "."))(Config(command="rl")), key)
        if kind not in (int, float):
            assert isinstance(rule, Length) or key == "task__options", key
            continue
        assert math.isfinite(rule.at_least) and math.isfinite(rule.at_most), key
        outside = [rule.at_least - 1, rule.at_most + 1, -(10**24), 10**24]
        outside += [math.nan, math.inf, -math.inf] if kind is float else []
        for value in map(kind, outside):
            if not (rule.or_zero and value == 0):
                said = f"config.{key.replace('__', '.')} is {value}, but it must be {rule}"
                assert refusal(**{key: value}) == f"{said}; correct it"
    for positive in ("rl__temperature", "sft__sharpness", "optim__clip_norm", "optim__eps"):
        assert typing.get_args(SETTINGS[positive])[1].at_least > 0, positive  # divided by


def test_settings_that_are_made_by_hand_are_checked():
    for make, said in (
        (lambda: LoRA(rank=-1), "rank is -1, but it must be at least 0 and at most 10000"),
        (lambda: LoRA(targets=("x",)), "targets is 'x', but it must be one of q, k, v, o, gate"),
        (lambda: EngineSize(tick_rows=-1), "tick_rows is -1, but it must be at least 0"),
        (lambda: ExitSettings(kind="cubic"), "kind is 'cubic', but it must be one of mlp, linear"),
        (lambda: ExitSettings(continuation_rank=2), "continuation_rank is 2, but a frozen"),
    ):
        with pytest.raises(UserError) as caught:
            make()
        assert str(caught.value).startswith(said)


CONTRADICTIONS = [
    ("rl", {"task__options": {"steps": {}}}, "options.steps is {}, but it must be a number, a str"),
    ("rl", {"task__options": {"a-b": 1}}, "options contains the name 'a-b', but a name must be a"),
    ("rl", {"rl__rollouts": 1}, "RLOO needs at least 2 rollouts per prompt, got 1; raise config."),
    ("rl", {"rl__dual_ascent": True}, "dual_ascent needs a floor of accuracy, but config.rl.acc"),
    ("rl", {"rl__dual_ascent": True, "rl__warmup_steps": 3}, "set config.rl.warmup_steps=0 or"),
    ("rl", {"rl__floor_of": "initial"}, "config.rl.accuracy_floor is 0; set config.rl.a"),
    ("rl", {"rl__updates_per_batch": 2, "rl__importance_cap": 2.0}, "importance_cap is 2, but"),
    ("rl", {"batch_size": 10, "optim__accumulate": 4}, "batch_size is 10, but it must be a mult"),
    ("rl", {"exits__layers": (2, 2)}, "config.exits.layers is (2, 2), but exits must be rising"),
    ("rl", {"exits__layers": (4, 2)}, "exits must be rising layer numbers, such as (5, 10, 15)"),
    ("rl", {"exits__continuation_rank": 2}, "continuation=linear or config.exits.continuation_ra"),
    ("rl", {"mesh__fsdp": 5}, "a multiple of config.mesh.data=1 × config.mesh.fsdp=5; make config"),
    ("rl", {"steps": 0}, "config.steps is 0, but only calibration with config.sft.lens_steps"),
    ("rl", {"steps": 0, "sft__lens_steps": 5}, "set config.steps to at least 1"),
    ("rl", {"pretrain__tom": 0.6, "pretrain__word_problems": 0.5}, "config.pretrain.tom add up to"),
    ("rl", {"eval__policies": ("full", "half")}, "policy 'half' is not known; use full, sample"),
    ("eval", {"eval__policies": ("shuffled", "sample")}, "is a control for 'sample', but 'sample'"),
    ("eval", {"eval__policies": ()}, "config.eval.policies is empty"),
    ("rl", {"generate__policy": "fixed:0"}, "policy 'fixed:0' is not known"),
    ("rl", {"checkpoint__final": "best"}, "the best checkpoint; set config.checkpoint.keep_best=1"),
    ("rl", {"checkpoint__best_metric": "rewards"}, "choose one of val/reward, "),
    (
        "finetune",
        {"lora__rank": 0, "model__dtype": "bfloat16"},
        "config.lora.rank=0 trains all weights; set config.model.dtype to auto or float32, or conf",
    ),
    (
        "sft",
        {"checkpoint__best_metric": "-kl/teacher", "sft__lens_steps": 2},
        "sft does not measure that in its last phase, which trains the heads alone; choose one of",
    ),
    ("rl", {"eval__split": "test"}, "split is 'test', but a training run "),
    ("sft", {"sft__explore": 0.5}, "explore is 0.5, but config.sft.exit_loss=sampled"),
    ("sft", {"sft__completions": 3}, "config.optim.accumulate=1 × config.sft.completions=3"),
    ("sft", {"batch_size": 12, "sft__completions": 3}, "sft.generate_batch is 64, but it must be"),
    ("sft", {"sft__completions": 2, "sft__trajectories": "dataset"}, "one completion per prompt"),
    ("sft", {"lora__rank": 0, "sft__target": "student"}, "set config.sft.target=teacher or own"),
    ("rl", {"batch_size": 100_000, "rl__rollouts": 11}, "is 100000 × 11 = 1100000, but the"),
    ("rl", {"rl__max_new_tokens": 10**6, "batch_size": 1000}, "× rl.max_new_tokens is 1000 ×"),
    ("eval", {"eval__problems": 10**5, "eval__max_new_tokens": 10**5}, "eval.problems × eval.ma"),
    ("sft", {"sft__generate_batch": 10**5, "sft__max_new_tokens": 10**6}, "sft.generate_batch × "),
    ("pretrain", {"batch_size": 10**5, "pretrain__length": 10**6}, "batch_size × pretrain.len"),
    ("pretrain", {"pretrain__width": 10**6, "pretrain__layers": 100}, "parameters in the blocks"),
    # Long values are refused, and not repeated.
    ("rl", {"seed": 10**5000}, "seed is a number of thousands of digits, but it must be at"),
    ("rl", {"optim__lora_lr": 10**400}, "…, but that is too large"),
    ("rl", {"model__path": "x" * 5000}, "… with 5000 characters, but it must have at most 1000"),
    (
        "rl",
        {"model__path": "a\0b"},
        r"'a\x00b', but it must be valid Unicode text without NUL characters",
    ),
    (
        "rl",
        {"generate__prompts": ("\ud800",)},
        "it must be valid Unicode text without NUL characters",
    ),
    ("rl", {"exits__layers": (1,) * 2000}, "with 2000 values, but it must have at most 1000"),
    ("rl", {"eval__measured": ["x" * 500]}, "…, but it must be of type str"),
]


def test_what_does_not_go_together_is_one_short_sentence():
    for command, settings, words in CONTRADICTIONS:
        said = refusal(command, **settings)
        assert words in said and len(said) < 300, said
    # Rules of a command bind that command only.
    assert build("sft", rl__rollouts=1).rl.rollouts == 1
    assert build("sft", steps=0, sft__lens_steps=5).steps == 0
    assert build("sft", sft__explore=0.5, sft__exit_loss="expected").sft.explore == 0.5


def test_exits_default_to_every_fifth_layer_below_the_last():
    assert check_exits((), 24) == (5, 10, 15, 20) and check_exits((1, 3), 4) == (1, 3)
    with pytest.raises(UserError, match=r"\(4, 8\), but exits must be rising .* from 1 to 7"):
        check_exits((4, 8), 8)
    with pytest.raises(UserError, match=r"a model of 5 layers is too shallow .*; set config\.ex"):
        check_exits((), 5)


def test_policies_have_a_name_and_sometimes_a_number():
    assert parse_policy("full") == ("full", None)
    assert parse_policy("threshold:0.5") == ("threshold", 0.5)
    assert parse_policy("fixed:6") == ("fixed", 6)
    wrong = "|Full|full:3|sample:0.5|threshold|threshold:0|threshold:1|threshold:nan|threshold:x"
    for text in f"{wrong}|fixed|fixed:0|fixed:-1|fixed:2.5|greedy".split("|"):
        with pytest.raises(UserError, match=r"policy '.*' is not known; use full, sample, thresh"):
            parse_policy(text)
    for kind, value in (("confidence", 0.9), ("speculate", 6)):
        assert parse_policy(f"{kind}:{value}", kind) == (kind, value)
        with pytest.raises(UserError, match="is not known"):
            parse_policy(f"{kind}:{value}")
    with pytest.raises(UserError, match=r"threshold:X \(0 < X < 1\), confidence:X or fixed:N"):
        parse_policy("confidence:2", "confidence")
    for text, of in (
        ("shuffled", "sample"), ("fixed:matched", "sample"), ("fixed:4", None), ("sample", None),
        ("shuffled:threshold:0.5", "threshold:0.5"), ("fixed:matched:fixed:3", "fixed:3"),
        ("shuffledness", None),
    ):  # fmt: skip
        assert control_of(text) == of


def test_the_suffix_of_every_array_type_says_its_axes():
    for name, kind in vars(axes).items():
        dims = getattr(kind, "dim_str", None)
        assert not dims or name.endswith(dims.replace(" ", "")), (name, dims)
