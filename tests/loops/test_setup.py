"""What a config makes of tasks and of the chat format, and what completions are judged by."""

import json
import random
import types

import jax
import numpy as np
import pytest
from saved_models import TRAINED

import jexit
from chat_templates import DEFAULT_SYSTEM, OPENED, SWITCHED, with_template
from jexit.config import Config, ExitSettings, TaskConfig
from jexit.data.loader import PromptBatch
from jexit.data.tokenizer import Tokenizer
from jexit.io.model_dir import load, save_model
from jexit.loops.generate import print_generations
from jexit.loops.rl import Judged
from jexit.loops.setup import load_model, load_task, sample_policy, with_trained_exits
from jexit.loops.stage import Stage, trained_parts
from jexit.model.policies import Sample
from jexit.steps.optim import STILL
from jexit.tasks.base import Rewards, turns
from jexit.tasks.exploretom import ExploreToM
from jexit.tasks.gsm8k import Gsm8k
from jexit.tasks.sums import Sums
from jexit.tasks.tom.task import Tom
from report_files import policy_figures
from small_runs import make_config, random_model, small_model


def model_with(tmp_path, template):
    tokenizer = with_template(template)
    tokenizer.backend.save_pretrained(tmp_path / "tokenizer")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    save_model(tmp_path / "model", small_model(tokenizer.vocab_size), tokenizer)
    return tmp_path / "model"


@pytest.fixture
def gsm8k(tmp_path):
    for split, numbers in (("train", range(6)), ("test", range(10, 12))):
        rows = [{"question": f"What is {n}?", "answer": f"It is.\n#### {n}"} for n in numbers]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(lines)
    return tmp_path


def test_a_model_keeps_what_its_exits_were_trained_under(tmp_path):
    tokenizer = Tokenizer.load("jexit/assets/tiny")
    arch = small_model(tokenizer.vocab_size).arch
    head = ExitSettings(bias=-1.0, **TRAINED)
    model = random_model(arch, 0.2, exit_layers=(1, 2), exit_head=head)
    save_model(tmp_path / "model", model, tokenizer)
    other = {"hazard_temperature": 2.0, "min_hazard": 0.7}
    targets = {"sharpness": 9.0, "target": "teacher"}
    own = {f"rl__{name}": value for name, value in other.items()}
    own |= {f"sft__{name}": value for name, value in targets.items()}
    trained = make_config("sft", tmp_path / "model", **own).exit_settings
    assert {name: getattr(trained, name) for name in TRAINED} == other | targets
    for command, changed in (("rl", other), ("finetune", {})):
        made, _ = load_model(make_config(command, tmp_path / "model", **own), trains=True)
        assert {name: getattr(made.exit_head, name) for name in TRAINED} == TRAINED | changed
    config = with_trained_exits(make_config("eval", tmp_path / "model", **own))
    assert (sample_policy(config), config.sft.sharpness, config.sft.target) == (
        Sample(np.float32(0.4), np.float32(0.2)), 7.0, "student",
    )  # fmt: skip
    model, asked = load(tmp_path / "model")[0], {"max_new_tokens": 8, "temperature": 1.0}
    named, given, plain = (
        jexit.generate(model, tokenizer, ["sum 12"] * 4, policy=policy, **asked).depths
        for policy in ("sample", Sample(0.4, 0.2), Sample())
    )
    assert named == given != plain
    # Of a model that does not say, the settings are the config's.
    save_model(tmp_path / "other", small_model(tokenizer.vocab_size), tokenizer)
    config = with_trained_exits(make_config("eval", tmp_path / "other", **own))
    assert (config.rl.min_hazard, config.sft.sharpness) == (0.7, 9.0)


def test_only_calibration_gives_frozen_exits_a_linear_continuation(model_dir):
    linear = {"exits__continuation": "linear"}
    made, _ = load_model(make_config("sft", model_dir, **linear), trains=True)
    assert made.exit_head.continuation == "linear"
    with pytest.raises(ValueError, match=r"exits\.continuation=frozen, and only calibration"):
        load_model(make_config("rl", model_dir, **linear), trains=True)
    made, _ = load_model(make_config("finetune", model_dir, **linear), trains=True)
    assert made.exit_head.continuation == "frozen"


def test_fine_tuning_makes_no_maps_for_exits_that_it_does_not_train(tmp_path):
    tokenizer = Tokenizer.load("jexit/assets/tiny")
    model = random_model(small_model(tokenizer.vocab_size).arch, 0.2, exit_layers=(1, 2))
    save_model(tmp_path / "base", model, tokenizer, with_exits=False)
    config = make_config("finetune", tmp_path / "base", exits__continuation="linear", lora__rank=0)
    made, _ = load_model(config, trains=True)
    split, labels, optimizer = trained_parts(made, config, 3)
    assert "continuation" not in split.trainable["blocks"]
    still = jax.tree.map(lambda label: label == STILL, labels)
    assert all(jax.tree.leaves(still["exits"])) and not any(jax.tree.leaves(still["blocks"]))
    moments = [leaf.shape for leaf in jax.tree.leaves(optimizer.init(split.trainable))]
    for leaf in jax.tree.leaves(split.trainable["exits"]):
        assert leaf.shape not in moments


@pytest.mark.parametrize("policy", ["sample", "speculate:1"])
def test_generations_are_printed_under_each_policy(model_dir, capsys, policy):
    config = make_config(
        "generate", model_dir, generate__policy=policy, generate__prompts=("sum 12",),
        generate__max_new_tokens=4,
    )  # fmt: skip
    print_generations(config)
    said = capsys.readouterr().out
    assert said.startswith("> sum 12\n") and "mean depth" in said


def test_the_config_switches_thinking(tmp_path, model_dir):
    path = model_with(tmp_path, SWITCHED)
    for thinking, end in (("off", "</think>\n\n"), ("auto", "<|assistant|>")):
        config = make_config("eval", path, task__thinking=thinking)
        _, tokenizer = load_model(config, trains=False)
        assert tokenizer.thinking == thinking
        assert tokenizer.chat_text("sum 12").endswith(end)
    with pytest.raises(ValueError, match=r"no switch .* set config\.task\.thinking=auto"):
        load_model(make_config("rl", model_dir, task__thinking="on"), trains=True)


def test_the_config_gives_a_system_message(tmp_path):
    path = model_with(tmp_path, DEFAULT_SYSTEM)
    for system, shown in (("", "Add well."), ("Solve.", "Solve.")):
        _, tokenizer = load_model(make_config("eval", path, task__system=system), trains=False)
        asked = [*turns([("sum 3", "3")]), {"role": "user", "content": "sum 12"}]
        text = tokenizer.chat_text(asked)
        assert text == (
            f"<|system|>{shown}<|user|>sum 3<|assistant|>3<|end|><|user|>sum 12<|assistant|>"
        )
        assert tokenizer.encode_prompt(asked) == tokenizer.encode(text)
        own = [{"role": "system", "content": "Rows say so."}, *asked]
        assert tokenizer.chat_text(own) == text.replace(shown, "Rows say so.")


def test_completions_are_judged_with_the_prompts_thought_and_what_was_cut_off(gsm8k):
    (gsm8k / "test.jsonl").write_text(json.dumps({"question": "?", "answer": "#### 7"}) + "\n")
    config = Config.from_dict({"command": "rl", "task": {"name": "gsm8k", "path": str(gsm8k)}})
    task = load_task(config.task, "test")
    for template, completion, cut, kind in [
        (OPENED, "it is 7.\n#### 7", False, "none"),  # the prompt's thought goes on to the end
        (OPENED, "it is 6\n</think>\n\n#### 7", False, "strict"),
        (SWITCHED, "it is 7.\n#### 7", False, "strict"),
        (SWITCHED, "<think>it is 7.\n#### 7", False, "none"),
        (SWITCHED, "3 + 4 = 7", False, "lenient"),
        (SWITCHED, "3 + 4 = 7", True, "none"),
        (SWITCHED, "#### 7", True, "strict"),
    ]:
        tokenizer = with_template(template)
        ids = tokenizer.encode(completion) + ([] if cut else [tokenizer.eos_id])
        rollouts = types.SimpleNamespace(
            completion=lambda row, ids=ids: ids,
            rows=1,
            prompt_B=np.array([0]),
            truncated_B=np.array([cut]),
            depths_BT=np.full((1, len(ids)), 3),
        )
        prompts = PromptBatch(problems=[task.problem("test", 0)], tokens=[[]])
        judged = Judged.of(task, tokenizer, prompts, rollouts)
        opened = "<think>\n" if template == OPENED else ""
        assert [made.text for made in judged.attempts] == [opened + completion]
        assert [verdict.kind for verdict in judged.verdicts] == [kind]


STORY = "Ann entered the den. Ann moved the key to the tray, which is also located in the den."


def test_a_generated_task_has_the_configs_settings():
    config = TaskConfig(
        name="tom",
        options={"steps": "coarse", "people_max": 4, "moves_max": 5, "kinds": ("memory", "belief")},
        reward_strict=2.0,
        reward_lenient=0.25,
        reward_none=-3.0,
        time_limit=7.0,
    )
    task = load_task(config, "train")
    assert isinstance(task, Tom)
    assert (task.mode, task.people, task.moves) == ("coarse", (3, 4), (3, 5))
    assert (task.kinds, task.rewards) == (
        ("memory", "belief"),
        Rewards(strict=2.0, lenient=0.25, none=-3.0),
    )
    assert task.time_limit == 7.0
    assert len(load_task(TaskConfig(name="tom"), "train").kinds) == 6
    sums = load_task(TaskConfig(options={"steps": "3", "operands_min": 4}), "train")
    assert isinstance(sums, Sums) and (sums.mode, sums.operands) == (3, (4, 8))


def test_stories_and_rows_come_from_files_where_a_path_is_given(tmp_path):
    file = tmp_path / "test.csv"
    file.write_text(f'story,question,answer\n"{STORY}",In which container is the key now?,tray\n')
    for name in ("tom", "exploretom"):
        task = load_task(TaskConfig(name=name, path=str(file)), "test")
        assert isinstance(task, ExploreToM)
        assert task.problem("test", 0).answer == "tray"
        with pytest.raises(ValueError, match="no problem in its train split"):
            load_task(TaskConfig(name=name, path=str(file)), "train")
    (tmp_path / "train.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    assert isinstance(load_task(TaskConfig(name="gsm8k", path=str(tmp_path)), "train"), Gsm8k)


def test_what_was_measured_before_is_read_as_it_was_written(tmp_path):
    stage, path = types.SimpleNamespace(workdir=tmp_path), tmp_path / "before.json"
    for text, words in [
        ('{"policy": "x", "accuracy": "high"}', r"before\.json: accuracy is 'high', but"),
        ("[]", r"before\.json is \[\], but it must be an object"),
        ("{", r"before\.json is not valid JSON .*; delete the file, or repeat"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            Stage.measure_before(stage)
    # A file of before there were layers per problem has them.
    figures = policy_figures("sample", random.Random(0))
    figures.pop("layers_per_problem", None)
    path.write_text(json.dumps(figures))
    layers = figures["depth_mean"] * figures["completion_length"]
    assert Stage.measure_before(stage).layers_per_problem == pytest.approx(layers)
