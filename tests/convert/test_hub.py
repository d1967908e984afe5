"""Models to and from the Hugging Face hub, and the cards that they have there."""

import json

import pytest
from huggingface_hub import ModelCard, constants
from stand_in_hub import TOKEN, stand_in_hub

from convert import from_hf, to_hf
from jexit.config import LoRA
from jexit.io.model_dir import load, save_model
from report_files import evaluation, write_json
from small_runs import make_config, saved_small_model


def measured(**changes):
    """An evaluation of the model of `trained`."""
    return evaluation() | {
        "model": {"path": "runs/a/model", "layers": 3, "exits": [1, 2]} | changes
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run of rl with its evaluation, on a base from the hub."""
    folder = tmp_path_factory.mktemp("hub")
    base = saved_small_model(folder / "base")
    named = json.loads((base / "jexit.json").read_text()) | {"source": "somebody/small-base"}
    (base / "jexit.json").write_text(json.dumps(named))
    model, tokenizer = load(base, exit_layers=(1, 2), lora=LoRA(rank=2))
    save_model(folder / "run" / "model", model, tokenizer, base=str(base))
    settings = {
        "rl__depth_coef": 0.25,
        "task__options__operands_max": 5,
        "task__options__data": "/home/somebody/rows.jsonl",
        "task__path": "/home/somebody/data",
        "task__system": "Answer and/or ask.",
    }
    write_json(folder / "run" / "config.json", make_config("rl", base, **settings).to_dict())
    write_json(folder / "run" / "eval" / "eval.json", measured())
    return folder / "run"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub, which its library takes for the real one."""
    with stand_in_hub({}) as server:
        patched = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in patched.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_a_card_says_what_the_run_and_its_evaluation_say(trained, tmp_path):
    target = tmp_path / "out"
    assert to_hf.main([f"--source={trained}", f"--target={target}", "--card"]) == 0
    text, card = (target / "README.md").read_text(), ModelCard.load(target / "README.md")
    assert card.data.base_model == "somebody/small-base"
    assert card.data.library_name == "transformers" and "jexit" in card.data.tags
    results = evaluation()["runs"]
    assert [found.metric_value for found in card.data.eval_results] == [
        round(result["accuracy"], 4) for result in results
    ]
    for result in results:
        low, high = result["accuracy_ci95"]
        assert (
            f"| `{result['policy']}` | {100 * result['accuracy']:.1f} % ({100 * low:.1f}–"
            f"{100 * high:.1f}) | {100 * result['depth_fraction']:.1f} %"
        ) in text
    for line in (
        "**rl** of", "on `sums`", "| `rl.depth_coef` | `0.25` |",
        "| `task.options.operands_max` | `5` |", "| `task.options.data` | `'rows.jsonl'` |",
        "| `task.system` | `'Answer and/or ask.'` |",
        "`sums`, test split, 256 problems; ", "Measured on `a`.", 'jexit.load("out")',
        "at layers 1, 2;",
        'AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)',
    ):  # fmt: skip
        assert line in text, line
    assert "somebody/" not in text.replace("somebody/small-base", "") and "task.path" not in text
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
    assert "The model directory does not contain" in text and "not recorded" in text
    other = tmp_path / "other"
    write_json(other / "eval.json", measured(layers=9))
    for options, said in (
        (
            ["--push=nobody"],
            "--push is 'nobody', but it must be OWNER/NAME of a repository",
        ),
        ([f"--eval={trained}"], "only a model card uses it; add --card or --push"),
        (
            ["--card", f"--eval={other}"],
            "has the results of runs/a/model (9 layers, exits ",
        ),
        (
            ["--card", f"--eval={tmp_path}"],
            "eval.json; give an eval.json that configs/eval.py",
        ),
    ):
        capsys.readouterr()
        assert to_hf.main([source, f"--target={tmp_path / 'no'}", *options]) == 1
        assert said in capsys.readouterr().err
        assert not (tmp_path / "no").exists()


def test_up_to_the_hub_and_down_from_it(trained, tmp_path, hub, capsys, monkeypatch):
    def run(module, *options):
        code, said = module.main(options), capsys.readouterr()
        return code, said.out + said.err

    out, again = tmp_path / "out", tmp_path / "again"
    code, said = run(to_hf, f"--source={trained}", f"--target={out}", "--push=me/exits")
    assert code == 0 and "; uploaded to me/exits" in said, said
    assert hub.private == {"me/exits": True}
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert hub.repositories["me/exits"].items() >= files.items()
    assert {"README.md", "model.safetensors", "exit_heads.safetensors"} < files.keys()

    hub.repositories["me/exits"]["pytorch_model.bin"] = b"a pickle"
    asked = ["--source=me/exits", f"--target={again}"]
    code, said = run(from_hf, *asked)
    assert code == 1 and "convert.from_hf --download" in said and hub.fetched == []
    code, said = run(from_hf, *asked, "--download")
    assert code == 0, said
    assert "pytorch_model.bin" not in hub.fetched
    # The export and what came back are one model.
    assert run(to_hf, f"--source={again}", f"--target={tmp_path / 'third'}")[0] == 0
    for name in ("model.safetensors", "exit_heads.safetensors"):
        assert (tmp_path / "third" / name).read_bytes() == files[name]

    for source, words in (
        ("me/nothing", "me/nothing cannot be downloaded ("),
        ("nobody", "--source is nobody, but --download needs the OWNER/NAME of a model on the hub"),
        (out, f"--source is the local directory {out}, but --download fetches a model from"),
    ):
        code, said = run(from_hf, f"--source={source}", "--target=no", "--download")
        assert code == 1 and words in said
    monkeypatch.setenv("HF_TOKEN", "wrong")
    kept = tmp_path / "kept"
    code, said = run(to_hf, f"--source={trained}", f"--target={kept}", "--push=me/exits")
    assert code == 1 and "kept has been written, but its upload to me/exits failed (" in said
    assert (kept / "model.safetensors").exists()
