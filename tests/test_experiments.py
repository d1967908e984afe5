"""The studies' files: that they build, and that the commands in their heads are commands."""

import importlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest
from ml_collections import ConfigDict

from jexit.config import TINY_CALIBRATED_PATH, TINY_PATH, Config, check_key
from jexit.main import parse
from jexit.sweep.plan import Sweep

ROOT = pathlib.Path(__file__).parents[1]
STUDIES = sorted((ROOT / "configs" / "experiments").glob("*.py"))


def config_of(name: str) -> ConfigDict:
    path, _, variant = name.partition(":")
    made = importlib.import_module(path.removesuffix(".py").replace("/", ".")).get_config
    return made(variant) if variant else made()


def head(path: pathlib.Path) -> str:
    """The file's head with every command on a line."""
    return re.sub(r"\s*\\\n\s*", " ", re.match(r'"""(.*?)"""', path.read_text(), re.DOTALL)[1])


def test_the_commands_of_a_study_name_files_and_settings_that_there_are():
    for path in STUDIES:
        name, text = f"configs/experiments/{path.name}", head(path)
        assert json.dumps(Config.from_dict(config_of(name)).to_dict())
        sweeps = [
            Sweep.parse(shlex.split(line))
            for line in re.findall(r"bash launch/sweep\.sh (.*)", text)
        ]
        scripts = [ROOT / script for script in re.findall(r"bash (studies/\w+\.sh)", text)]
        assert sweeps or scripts, f"{path} has no command"
        for sweep in sweeps:
            assert Config.from_dict(config_of(sweep.config)).eval.problems > 0  # for the table
            if sweep.evaluation:
                assert Config.from_dict(config_of(sweep.evaluation)).command == "eval"
            for key in (*sweep.grid, *sweep.fixed, *sweep.evaluation_settings):
                check_key(f"config.{key}")
        for key in re.findall(r"--config\.([\w.]+)=|`([a-z_]+\.[a-z_]+)=", text):
            check_key(f"config.{''.join(key)}")
        for config in re.findall(r"configs/[\w/]+\.py(?::\w+)?", text):
            config_of(config)
        for script in scripts:
            lines = script.read_text().replace("\\\n", " ")
            assert f'config="$checkout/{name}"' in lines
            subprocess.run(["bash", "-n", script], check=True)
            stages = re.findall(r'"\$config:(\w+)"', lines)
            assert len(stages) > 2
            for stage in stages:
                Config.from_dict(config_of(f"{name}:{stage}"))
            for key in re.findall(r"(?:--config\.| )([a-z_]+(?:\.[a-z_]+)+)=", lines):
                check_key(f"config.{key}")
    with pytest.raises(ValueError, match="choose tiny, word_problems"):
        config_of("configs/experiments/measures.py:gsm8k")


RECORDS = """#!/usr/bin/env bash
printf '%s\\0' "${0##*/}" "$@" >> "$RECORD"
printf '\\n' >> "$RECORD"
"""


def test_scripts_sweep_over_models_that_exist_by_then(tmp_path, monkeypatch):
    """Each command that a script gives is checked as if it ran, and its runs are taken as made."""
    checkout, record = tmp_path / "checkout", tmp_path / "record"
    shutil.copytree(ROOT / "studies", checkout / "studies")
    for name in ("configs", "jexit"):
        (checkout / name).symlink_to(ROOT / name)
    for split in ("train", "test"):
        rows = checkout / "data" / "gsm8k" / f"{split}.jsonl"
        rows.parent.mkdir(parents=True, exist_ok=True)
        rows.write_text('{"question": "What is 1 + 1?", "answer": "2\\n#### 2"}\n')
    for stand_in in ("launch/sweep.sh", "launch/run.sh", ".venv/bin/python"):
        path = checkout / stand_in
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(RECORDS)
        path.chmod(0o755)
    monkeypatch.chdir(checkout)
    scripts = [ROOT / "studies" / f"{study.stem}.sh" for study in STUDIES]
    for script in filter(pathlib.Path.exists, scripts):
        record.write_text("")
        subprocess.run(
            ["bash", f"studies/{script.name}"], cwd=checkout,
            env=os.environ | {"RECORD": str(record)}, check=True,
        )  # fmt: skip
        there = {TINY_PATH, TINY_CALIBRATED_PATH}
        commands = [line.split("\0")[:-1] for line in record.read_text().splitlines()]
        assert len(commands) >= 3
        for program, *arguments in commands:
            options = dict(a.removeprefix("--").split("=", 1) for a in arguments if "=" in a)
            if program != "sweep.sh":
                there.add(options.get("target") or options["workdir"])
                assert options.get("source") or parse(["jexit.main", *map(relative, arguments)])
                continue
            sweep = Sweep.parse(list(map(relative, arguments)))
            for cell in sweep.cells():
                sweep.check_settings(cell)
                config = parse(["jexit.main", *sweep.training(cell)]).config
                if sweep.evaluation:
                    section = config.to_dict()["task"]
                    measured = parse(["jexit.main", *sweep.evaluating(cell, section)]).config
                    assert measured.exits.layers in ((), config.exits.layers)
                start = config.model.path.removesuffix("/model")
                assert start in there or start.startswith("models/"), (cell.name, start)
                there.add(str(cell.workdir))


def relative(argument: str) -> str:
    return argument.replace("studies/../", "")
