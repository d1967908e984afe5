"""Finding a model: a run's directory, the hub's local cache, and what is neither."""

import shutil

import pytest

from jexit.io.model_source import find_model, open_model


def test_a_runs_directory_means_its_model(models, tmp_path):
    shutil.move(models / "whole", tmp_path / "run" / "model")
    (tmp_path / "run" / "config.json").write_text("{}")  # the run's, not Hugging Face's
    assert find_model(tmp_path / "run") == tmp_path / "run" / "model"


def test_what_is_no_model_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="file is a file; give the directory of a model"):
        open_model("file")
    with pytest.raises(FileNotFoundError, match=r"empty holds no model \(none of jexit\.json"):
        open_model("empty")
    for path in ("", "runs/a/b", "./none", "/nowhere"):
        with pytest.raises(FileNotFoundError, match="no model directory at"):
            open_model(path)
    with pytest.raises(
        FileNotFoundError, match=r"no directory org/none, .*fetch a hub model first"
    ):
        open_model("org/none")


def test_a_hub_id_means_the_local_cache(models, tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "hub" / "models--org--small" / "snapshots" / "abc"
    shutil.copytree(models / "whole", snapshot)
    (tmp_path / "hub" / "models--org--small" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--small" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert open_model("org/small").directory == snapshot
