"""The command line: a user's mistake is one sentence, an exit code, and nothing on disk."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import to_hf
from jexit import main
from jexit.data.tokenizer import Tokenizer
from jexit.io.model_dir import save_model
from small_runs import small_model

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory) -> pathlib.Path:
    """A small random checkpoint in Hugging Face format."""
    place = tmp_path_factory.mktemp("hf")
    tokenizer = Tokenizer.load("jexit/assets/tiny")
    save_model(place / "own", small_model(tokenizer.vocab_size), tokenizer)
    assert to_hf.main([f"--source={place / 'own'}", f"--target={place / 'hf'}"]) == 0
    return place / "hf"


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
    assert error.startswith("jexit: ")
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    for word in words:
        assert word in error
    assert left == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--config.rl.rolouts=4"],
            ["config.rl.rolouts does not exist; did you mean config.rl.rollouts?", "rl has"],
        ),
        (["--config.nope=1"], ["config.nope does not exist; config has batch_size"]),
        (["--config.seed.x=1"], ["config.seed.x does not exist; config.seed is one value"]),
        (["--config.exits.layers=(2,8)"], ["exit 8", "8 layers", "from 1 to 7"]),
        (["--config.exits.layers=(4,2)"], ["(4, 2)", "rising"]),
        (["--config.rl.rollouts=1"], ["RLOO needs at least 2 rollouts per prompt, got 1", "raise"]),
        (["--config.steps=many"], ["config.steps is 'many'; it must be of type int"]),
        (["--config.steps", "1e3"], ["config.steps is '1e3'; it must be of type int"]),
        (["--config.optim.b1=a: b"], ["config.optim.b1 is 'a: b'; it must be of type float"]),
        (["--config.rl.dual_ascent=2"], ["config.rl.dual_ascent is '2'; it must be of type bool"]),
        (["--config.rl=3"], ["config.rl is '3'; it holds settings: set config.rl.KEY instead"]),
        (["--config.steps=0"], ["config.steps is 0", "at least 1"]),
        (["--config.rl.advantage=best"], ["'best'", "rloo, group_mean"]),
        (["--config.mesh.data=16"], ["data 16", "there are 8; lower"]),
        (["--config.mesh.data=5"], ["192 rows", "data 5 × fsdp 1", "multiple of 5"]),
        (["--config.batch_size=9", "--config.optim.accumulate=2"], ["batch_size 9", "multiple"]),
        (["--config.lora.targets=('q','x')"], ["'x'", "q, k, v"]),
        (["--config.eval.policies=('half',)"], ["'half'", "threshold:X"]),
        (["--config.task.max_prompt_tokens=3"], ["over the limit of 3", "max_prompt_tokens"]),
        (["--config.task.name=chess"], ["'chess'", "sums"]),
        (["--config.task.steps=7"], ["'7'", "config.task.steps"]),
        (["--config.model.path=nowhere"], ["no model directory at 'nowhere'"]),
        (["--steps=3"], ["steps"]),
        (["extra"], ["'extra'"]),
    ],
)
def test_a_wrong_setting_of_rl_is_one_sentence(call, hf_dir, arguments, words):
    own = [] if any("model.path" in a for a in arguments) else [f"--config.model.path={hf_dir}"]
    if not any("layers" in argument for argument in arguments):
        own.append("--config.exits.layers=(1,2)")
    if any("(2,8)" in argument for argument in arguments):
        own, words = ["--config.model.path=" + str(hf_dir)], ["exit 8", "3 layers", "from 1 to 2"]
    assert_refused(call(config("rl.py"), *own, *arguments), *words)


@pytest.mark.parametrize("settings", [[], ["--config.seed=1"]])
@pytest.mark.parametrize("name", ["nowhere.py", "nowhere.py:tiny"])
def test_a_config_file_that_is_not_there_is_named(call, name, settings):
    assert_refused(call(f"--config={name}", *settings), "the config file nowhere.py is not there")


def test_what_a_config_file_raises_is_told(call, tmp_path_factory):
    own = tmp_path_factory.mktemp("configs") / "own.py"
    own.write_text("def get_config():\n    return 1 / 0\n")
    words = "the config cannot be made (ZeroDivisionError: division by zero)"
    assert_refused(call(f"--config={own}"), words)


def test_a_flag_file_is_read_or_named(call, tmp_path_factory):
    wrong = tmp_path_factory.mktemp("flags") / "wrong"
    assert_refused(call(config("rl.py"), f"--flagfile={wrong}"), "flagfile", str(wrong))
    wrong.write_text("--config.steps=0\n")
    assert_refused(call(config("rl.py"), f"--flagfile={wrong}"), "config.steps is 0")


def test_full_fine_tuning_of_an_adapted_model_is_refused(call):
    model = f"--config.model.path={ROOT / 'jexit/assets/tiny-calibrated'}"
    assert_refused(
        call(config("rl.py"), model, "--config.lora.rank=0"),
        "adapters of rank 16",
        "--adapter=merge",
    )


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.pretrain.length=8", ["over the limit of 8"]),
        ("--config.pretrain.word_problems=1.5", ["1.5", "at most 1"]),
    ],
)
def test_text_that_cannot_be_pretrained_on_leaves_nothing(call, argument, words):
    path = f"--config.model.path={ROOT / 'jexit/assets/tiny'}"
    assert_refused(call(config("pretrain.py"), path, argument), *words)


def test_evaluation_samples_by_the_law_that_it_is_given(call, hf_dir):
    """With a floor of nearly 1 under the hazards every token leaves at the first exit."""
    depths = []
    for floor in (0.0, 0.999999):
        code, error, _ = call(
            config("eval.py"),
            f"--config.model.path={hf_dir}",
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


def test_no_config_and_an_unknown_preset_are_one_sentence(call):
    assert_refused(call(), "--config=configs/rl.py")
    assert_refused(call("--config=configs/nothing.py"), "nothing.py")
    assert_refused(call(config("rl.py:qwen9")), "'qwen9'", "qwen3-4b")


def damaged(hf_dir: pathlib.Path, place: pathlib.Path, change) -> pathlib.Path:
    """A copy of the checkpoint whose tensors went through `change`."""
    copy = place / "damaged"
    copy.mkdir()
    for file in hf_dir.iterdir():
        if file.name.startswith("exit_heads"):
            continue
        if file.name != "model.safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(hf_dir / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_a_checkpoint_with_wrong_tensors_is_refused_with_every_name(call, hf_dir, tmp_path_factory):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        tensors["model.norm.weight"] = np.zeros(5, np.float32)

    copy = damaged(hf_dir, tmp_path_factory.mktemp("damaged"), change)
    assert_refused(
        call(config("rl.py"), f"--config.model.path={copy}", "--config.exits.layers=(1,2)"),
        "missing model.layers.1.mlp.up_proj.weight",
        "surplus model.layers.9.mlp.up_proj.weight",
        "misshapen model.norm.weight [5] in place of [16]",
    )


def test_a_pickle_and_a_missing_tokenizer_are_refused(call, hf_dir, tmp_path_factory):
    copy = damaged(hf_dir, tmp_path_factory.mktemp("damaged"), lambda tensors: None)
    arguments = [config("rl.py"), f"--config.model.path={copy}", "--config.exits.layers=(1,2)"]
    (copy / "tokenizer.json").unlink()
    assert_refused(call(*arguments), "tokenizer")
    (copy / "tokenizer.json").write_bytes((hf_dir / "tokenizer.json").read_bytes())
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert_refused(call(*arguments), "pickle", "pytorch_model.bin")


def test_an_empty_data_set_is_refused_whichever_split_it_is(call, hf_dir, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    arguments = [
        config("rl.py"),
        f"--config.model.path={hf_dir}",
        "--config.exits.layers=(1,2)",
        "--config.task.name=gsm8k",
        f"--config.task.path={data}",
    ]
    row = '{"question": "What is 1+1?", "answer": "#### 2"}\n'
    for full in ((), ("train",), ("test",)):
        for split in ("train", "test"):
            (data / f"{split}.jsonl").write_text(row if split in full else "")
        # One row cannot be held out to validate with.
        empty = "val" if full == ("train",) else "train"
        assert_refused(call(*arguments), "gsm8k", f"no problem in its {empty} split")


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


def test_every_config_file_builds_for_every_preset():
    """Each file's defaults pass the rules that hold before a model is read."""
    import importlib.util

    from jexit.config import Config
    from jexit.presets import PRESETS

    for file in sorted((ROOT / "configs").glob("*.py")):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for preset in ("tiny", *PRESETS):
            built = Config.from_dict(module.get_config(preset))
            assert built.command == file.stem
            assert json.dumps(built.to_dict())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--coordinator=127.0.0.1:1"], ["--coordinator, --processes", "all three or none"]),
        (["--coordinator=h", "--processes=2", "--process=0"], ["'h'", "HOST:PORT of process 0"]),
        (["--coordinator=h:1", "--processes=2", "--process=2"], ["2 of", "counts from 0 to 1"]),
        (["--host_timeout=0"], ["host_timeout"]),
    ],
)
def test_wrong_flags_for_several_hosts(call, flags, words):
    result = call(config("rl.py"), *flags)
    assert_refused(result, *words)
    assert not result[2]
