"""The command, on tasks that lm-eval ships, from local files, with the shipped model."""

import json
import pathlib
import re

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed; it comes with the extra eval")

import lm_eval
from lm_eval.tasks import TaskManager

import jexit
from jexit.evaluation.harness import main
from jexit.tasks import make_task

ROOT = pathlib.Path(jexit.__file__).parent.parent
CONFIGS = ROOT / "configs" / "harness"
MODEL = ROOT / "jexit" / "assets" / "tiny-calibrated"
TASK = make_task("word_problems")


@pytest.fixture(scope="module")
def manager():
    """Knows the two tasks that the files are of: to list all of lm-eval's takes seconds."""
    shipped = pathlib.Path(lm_eval.__file__).parent / "tasks"
    folders = [str(CONFIGS), *(str(shipped / name) for name in ("arithmetic", "gsm8k"))]
    return TaskManager(include_path=folders, include_defaults=False)


@pytest.fixture
def here(tmp_path, monkeypatch, manager):
    """A working directory with data where the task files of configs/harness look for it."""
    problems = [TASK.problem("test", index) for index in range(12)]
    rows = [{"question": p.prompt, "answer": p.completion} for p in problems]
    for split in ("train", "test"):
        write(tmp_path / "data" / "gsm8k" / f"{split}.jsonl", rows)
    rows = [{"context": p.prompt, "completion": p.completion.partition("=")[0]} for p in problems]
    write(tmp_path / "data" / "arithmetic" / "single_digit_three_ops.jsonl", rows)
    monkeypatch.setattr("jexit.evaluation.harness.TaskManager", lambda include_path: manager)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(*options):
    return main([f"--model={MODEL}", f"--include_path={CONFIGS}", *options])


def test_a_built_in_task_of_log_likelihoods(here, capsys):
    shares = {}
    for policy in ("full", "fixed:1"):
        file = here / f"{policy.partition(':')[0]}.json"
        assert run("--tasks=arithmetic_local", "--limit=8", f"--policy={policy}",
                   "--apply_chat_template", f"--output={file}") == 0  # fmt: skip
        results = json.loads(file.read_text())
        shares[policy] = results["results"]["arithmetic_1dc"]["acc,none"]
        assert results["n-samples"]["arithmetic_1dc"]["effective"] == 8
        assert results["config"]["policy"] == policy
        assert results["config"]["model_args"] == {"pretrained": str(MODEL)}
    # The shipped model has learnt these stories, and cannot tell them in one layer of eight.
    assert shares["full"] >= 0.75 > shares["fixed:1"]
    assert results["config"]["depth_fraction"] < 0.7
    out = capsys.readouterr().out
    assert "arithmetic_1dc" in out and "policy fixed:1" in out and f"Wrote {file}" in out


@pytest.mark.slow
def test_a_built_in_task_of_generation(here):
    file = here / "new" / "gsm8k.json"
    assert run("--tasks=gsm8k_local", "--limit=3", "--num_fewshot=0", "--policy=threshold:0.5",
               "--max_gen_toks=32", "--log_samples", "--apply_chat_template",
               f"--output={file}") == 0  # fmt: skip
    results = json.loads(file.read_text())
    assert 0.0 <= results["results"]["gsm8k"]["exact_match,strict-match"] <= 1.0
    samples = [s for s in results["samples"]["gsm8k"] if s["filter"] == "strict-match"]
    assert len(samples) == 3 and results["config"]["tokens"] > 3
    model, tokenizer = jexit.load(MODEL)
    for sample in samples:
        # The text is what generate gives for the prompt that the task has written.
        prompt = sample["arguments"][0][0]
        made = jexit.generate(
            model, tokenizer, [prompt], policy=jexit.Threshold(0.5), max_new_tokens=32, chat=False,
            stop=["Question:", "</s>", "<|im_end|>"],
        )  # fmt: skip
        assert sample["resps"] == [made.texts]


def test_mistakes_are_one_sentence(here, capsys):
    for option, sentence in (
        ("--num_fewshot=-1", "its value is '-1', but it must be a whole number of at"),
        ("--limit=-3", "its value is '-3', but it must be above 0: a number of questions"),
        ("--limit=many", "its value is 'many'"),
    ):
        with pytest.raises(SystemExit) as ended:
            run("--tasks=gsm8k_local", option)
        assert ended.value.code == 2
        assert sentence in capsys.readouterr().err
    for options, sentence in (
        (["--tasks=no_such_task"], "lm-eval has no task 'no_such_task'"),
        (["--tasks=gsm8k_local", "--policy=often"], "policy 'often' is not known"),
        (["--tasks=gsm8k_local", "--model=nowhere"], "nowhere"),
        (
            ["--tasks=gsm8k_local", "--limit=1", "--num_fewshot=0", "--gen_kwargs=temperature=abc"],
            "--gen_kwargs='temperature=abc'",
        ),
    ):
        assert run(*options) == 1
        err = capsys.readouterr().err
        (error,) = re.findall("jexit: .*", err)  # lm-eval may have drawn a bar before
        assert sentence in error and "Traceback" not in err
