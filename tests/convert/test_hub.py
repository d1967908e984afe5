"""Models to and from the Hugging Face hub, and the cards that they have there."""

import json
import os
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from stand_in_hub import TOKEN, stand_in_hub

from convert import to_hf
from small_runs import ROOT, run, saved_small_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of rl with its evaluation, on the hub id that its base names."""
    folder = tmp_path_factory.mktemp("hub")
    base = saved_small_model(folder / "base")
    named = json.loads((base / "jexit.json").read_text()) | {"source": "somebody/small-base"}
    (base / "jexit.json").write_text(json.dumps(named))
    settings = {"steps": 1, "rl__depth_coef": 0.25, "task__options__operands_max": 5}
    run("rl", base, folder / "run", **settings)
    settings = {"eval__policies": ("full", "sample"), "eval__measures": ()}
    run("eval", folder / "run", folder / "run" / "eval", **settings)
    return folder / "run"


def convert(module, *options, **environment):
    done = subprocess.run(
        [sys.executable, "-m", f"convert.{module}", *options],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        | {name: str(value) for name, value in environment.items()},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def test_a_card_says_what_the_run_and_its_evaluation_say(trained, tmp_path):
    target = tmp_path / "out"
    assert to_hf.main([f"--source={trained}", f"--target={target}", "--card"]) == 0
    text, card = (target / "README.md").read_text(), ModelCard.load(target / "README.md")
    assert card.data.base_model == "somebody/small-base"
    assert card.data.library_name == "transformers" and "jexit" in card.data.tags
    evaluation = json.loads((trained / "eval" / "eval.json").read_text())
    assert [found.metric_value for found in card.data.eval_results] == [
        round(result["accuracy"], 4) for result in evaluation["runs"]
    ]
    for result in evaluation["runs"]:
        low, high = result["accuracy_ci95"]
        assert (
            f"| `{result['policy']}` | {100 * result['accuracy']:.1f} % ({100 * low:.1f}–"
            f"{100 * high:.1f}) | {100 * result['depth_fraction']:.1f} %"
        ) in text
    for line in (
        "**rl** of", "on `sums`", "| `rl.depth_coef` | `0.25` |",
        "| `task.options.operands_max` | `5` |",
        "`sums`, test split, 6 problems", 'jexit.load("out")', "at layers 1, 2;",
        'AutoModelForCausalLM.from_pretrained("out")',
    ):  # fmt: skip
        assert line in text, line
    # The run's `model/` is the same; an adapter is one of peft's.
    target = tmp_path / "adapter"
    given = [f"--source={trained / 'model'}", f"--target={target}", "--adapter=peft", "--card"]
    assert to_hf.main(given) == 0
    card = ModelCard.load(target / "README.md")
    assert card.data.library_name == "peft" and "AutoPeftModelForCausalLM" in card.text
    assert "| `rl.depth_coef` | `0.25` |" in card.text and card.data.eval_results


def test_a_model_that_nobody_trained_here_has_a_card_too(trained, tmp_path, capsys):
    source = f"--source={trained.parent / 'base'}"
    assert to_hf.main([source, f"--target={tmp_path / 'out'}", "--card"]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "The model directory does not contain" in text and "No evaluation was given" in text
    for options, said in (
        (
            ["--push=nobody"],
            "--push is 'nobody', but it must be OWNER/NAME of a repository",
        ),
        ([f"--eval={trained}"], "use it with --card or --push"),
        (
            ["--card", f"--eval={tmp_path}"],
            "eval.json; give an eval.json that configs/eval.py",
        ),
    ):
        capsys.readouterr()
        assert to_hf.main([source, f"--target={tmp_path / 'no'}", *options]) == 1
        assert said in capsys.readouterr().err
        assert not (tmp_path / "no").exists()


def test_up_to_the_hub_and_down_from_it(trained, tmp_path):
    out, hub = tmp_path / "out", {}
    with stand_in_hub(hub) as server:
        here = {"HF_ENDPOINT": server.url, "HF_HOME": tmp_path / "cache"}
        code, said = convert(
            "to_hf", f"--source={trained}", f"--target={out}", "--push=me/exits", **here,
            HF_TOKEN=TOKEN,
        )  # fmt: skip
        assert code == 0 and "; uploaded to me/exits" in said
        assert server.private == {"me/exits": True}
        files = {path.name: path.read_bytes() for path in out.iterdir()}
        assert hub["me/exits"].items() >= files.items()
        assert {"README.md", "model.safetensors", "exit_heads.safetensors"} < files.keys()

        hub["me/exits"]["pytorch_model.bin"] = b"a pickle"
        asked = ["--source=me/exits", f"--target={tmp_path / 'again'}"]
        code, said = convert("from_hf", *asked, **here)
        assert code == 1 and "convert.from_hf --download" in said and server.fetched == []
        code, said = convert("from_hf", *asked, "--download", **here)
        assert code == 0 and "pytorch_model.bin" not in server.fetched
        for options, words in (
            (["--source=me/nothing"], "me/nothing cannot be downloaded"),
            (
                [f"--source={out}"],
                f"--source is {out}, but --download needs the OWNER/NAME of a model on the hub",
            ),
        ):
            code, said = convert("from_hf", *options, "--target=no", "--download", **here)
            assert code == 1 and words in said
        code, said = convert(
            "to_hf", f"--source={trained}", f"--target={tmp_path / 'kept'}", "--push=me/exits",
            **here, HF_TOKEN="wrong",
        )  # fmt: skip
        assert code == 1 and "kept is written, but it cannot be uploaded to me/exits (" in said
        assert (tmp_path / "kept" / "model.safetensors").exists()
    # The export and what came back are one model.
    assert to_hf.main([f"--source={tmp_path / 'again'}", f"--target={tmp_path / 'third'}"]) == 0
    for name in ("model.safetensors", "exit_heads.safetensors"):
        assert (tmp_path / "third" / name).read_bytes() == files[name]
