"""The command line: a user's mistake is one sentence, an exit code, and nothing on disk."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from jexit import main
from small_runs import ROOT, saved_small_model


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Runs `main` in an empty directory; returns exit code, stderr and what it left on disk."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, list[pathlib.Path]]:
        before = set(tmp_path.rglob("*"))
        code = main.main(["jexit", *arguments])
        return code, capsys.readouterr().err, sorted(set(tmp_path.rglob("*")) - before)

    return run


def config(name: str) -> str:
    return f"--config={ROOT / 'configs' / name}"


def assert_refused(result, *words: str) -> None:
    code, error, left = result
    assert code == 1
    assert error.startswith("jexit: ") and not re.match(r"jexit: [\w.]+: ", error)  # no class
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    for word in words:
        assert word in error
    assert left == []


WRONG = [
    ("--config.rl.rolouts=4", "rl.rolouts does not exist; did you mean config.rl.rollouts?"),
    ("--config.nope=1", "config.nope does not exist; use one of the keys batch_size"),
    ("--config.seed.x=1", "config.seed.x does not exist; set config.seed itself, which"),
    ("--config.exits.layers=(2,8)", "(2, 8), but exits must be rising layer numbers from 1 to 7"),
    ("--config.steps=many", "config.steps is 'many', but it must be of type int"),
    ("--config.steps=1.5", "config.steps is '1.5', but it must be of type int"),
    ("--config.optim.b1=a: b", "config.optim.b1 is 'a: b', but it must be of type float"),
    ("--config.rl.dual_ascent=2", "config.rl.dual_ascent is '2', but it must be of type bool"),
    ("--config.rl=3", "config.rl is '3', but it must be a group of settings; set single"),
    ("--config.mesh.data=16", "requests 16 devices (data=16 × fsdp=1 × tensor=1), but this"),
    ("--config.task.max_prompt_tokens=3", "over the limit of 3;"),
    ("--config.task.name=chess", "there is no task 'chess'; set config.task.name to one of"),
    ("--config.model.path=nowhere", "no model directory at 'nowhere'"),
    (
        "--config.log.wandb_project=a",
        "wandb is not installed; run pip install -e '.[wandb]' in the checkout",
    ),
    ("--config.model.path=runs/sft-qwen3-4b", "make it with python -m jexit.main --config"),
    ("--steps=3", "--steps is not an option, but a setting; use --config.steps"),
    ("--stps=3", "Unknown command line flag 'stps'"),
    ("extra", "argument 'extra' is not a flag"),
    ("--coordinator=127.0.0.1:1", "--coordinator, --processes and --process belong together"),
    ("--coordinator=h --processes=2 --process=0", "'h', but it must be HOST:PORT of process 0"),
    ("--coordinator=h:1 --processes=2 --process=2", "--process is 2, but with --processes=2 it"),
    *((f"--host_timeout={n}", f"--host_timeout is {n}, but it") for n in (0, "inf", "nan")),
]


def test_a_wrong_command_is_one_sentence_and_leaves_nothing(call, tmp_path_factory, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    for arguments, words in WRONG:
        given = [arguments] if ": " in arguments else arguments.split()
        assert_refused(call(config("rl.py"), *given), words)
    assert_refused(call(), "--config=configs/rl.py")
    assert_refused(call(config("rl.py:qwen9")), "'qwen9'", "qwen3-4b")
    for settings in ([], ["--config.seed=1"]):
        said = "the config file nowhere.py does not exist"
        assert_refused(call("--config=nowhere.py:tiny", *settings), said)
    own = tmp_path_factory.mktemp("configs") / "own.py"
    own.write_text("def get_config():\n    return 1 / 0\n")
    words = "the config file raised an error (ZeroDivisionError: division by zero)"
    assert_refused(call(f"--config={own}"), words)
    flags = own.with_name("flags")
    assert_refused(call(config("rl.py"), f"--flagfile={flags}"), "flagfile", str(flags))
    flags.write_text("--config.steps=0\n")
    assert_refused(call(config("rl.py"), f"--flagfile={flags}"), "config.steps is 0")
    words = ("adapters of rank 16", "--adapter=merge")
    assert_refused(call(config("rl.py"), "--config.lora.rank=0"), *words)
    path = f"--config.model.path={ROOT / 'jexit/assets/tiny'}"
    short = "--config.pretrain.length=8"
    assert_refused(call(config("pretrain.py"), path, short), "over the limit of 8")
    copy = shutil.copytree(ROOT / "jexit/assets/tiny", own.with_name("copy"))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    words = ("pickle", "pytorch_model.bin")
    assert_refused(call(config("rl.py"), f"--config.model.path={copy}"), *words)


def test_a_fault_keeps_its_traceback(call, monkeypatch):
    """A ValueError of a library is no user's mistake."""
    from jexit.loops import rl

    def fault(*_):
        raise ValueError("shapes do not match")

    monkeypatch.setattr(rl, "reinforce", fault)
    with pytest.raises(ValueError, match="shapes do not match"):
        call(config("rl.py"))


@pytest.mark.slow
def test_evaluation_samples_by_the_law_that_it_is_given(call, tmp_path):
    """With a floor of nearly 1 under the hazards every token leaves at the first exit."""
    model_dir, depths = saved_small_model(tmp_path / "model"), []
    for floor in (0.0, 0.999999):
        code, error, _ = call(
            config("eval.py"),
            f"--config.model.path={model_dir}",
            "--config.exits.layers=(1,2)",
            "--config.eval.policies=('sample',)",
            "--config.eval.problems=4",
            "--config.eval.max_new_tokens=8",
            f"--config.rl.min_hazard={floor}",
            f"--workdir=floor-{floor}",
        )
        assert code == 0, error
        run = json.loads(pathlib.Path(f"floor-{floor}/eval.json").read_text())["runs"][0]
        depths.append(run["depth_mean"])
    assert depths[0] > depths[1] + 1.0  # 3 layers; the first token always runs all of them
    assert depths[1] < 1.5


def test_an_empty_data_set_is_refused_whichever_split_it_is(call, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    arguments = [config("rl.py"), "--config.task.name=gsm8k", f"--config.task.path={data}"]
    row = '{"question": "What is 1+1?", "answer": "#### 2"}\n'
    for full in ((), ("train",), ("test",)):
        for split in ("train", "test"):
            (data / f"{split}.jsonl").write_text(row if split in full else "")
        # One row cannot be held out to validate with.
        empty = "val" if full == ("train",) else "train"
        assert_refused(call(*arguments), "gsm8k", f"no problem in its {empty} split")


def test_a_config_is_the_folders_own_or_jexits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = f"{ROOT}/configs/rl.py"
    for given, found in (
        (["--config=configs/rl.py:qwen3-4b"], [f"--config={own}:qwen3-4b"]),
        (["--config", "configs/rl.py"], ["--config", own]),
        (["--config"], ["--config"]),
        (["--config=/x/y.py"], ["--config=/x/y.py"]),
    ):
        assert main._with_own_config(["jexit", *given]) == ["jexit", *found]
    assert main.parse(["jexit", "--config=configs/rl.py:qwen3-4b"]).config.preset == "qwen3-4b"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "rl.py").write_text("")
    given = ["jexit", "--config=configs/rl.py"]
    assert main._with_own_config(given) == given


def test_as_a_command_it_exits_with_one_line_and_no_traceback(tmp_path):
    """Once through a process of its own, from the interpreter's start to its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "jexit.main", config("rl.py"), "--config.rl.rollouts=1"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "jexit: RLOO needs at least 2 rollouts per prompt, got 1; raise config.rl.rollouts\n"
    )
    assert list(tmp_path.iterdir()) == []
