"""The wheel that the sdist builds: what it holds, and the installed command in an empty folder."""

import os
import pathlib
import re
import site
import subprocess
import sys
import zipfile

import pytest

from jexit import cli

ROOT = pathlib.Path(__file__).parents[1]
MOST_BYTES = 8_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pack = ("-m", "hatchling", "build", "--target", "sdist", "--directory", folder)
    subprocess.run([sys.executable, *map(str, pack)], cwd=ROOT, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder)
    subprocess.run([sys.executable, *map(str, build), str(sdist)], check=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory):
    """`jexit` of a new environment with the wheel; what it needs comes from this one."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "needed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    install = ("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    subprocess.run([sys.executable, *map(str, install), str(wheel)], check=True)
    return folder / "bin" / "jexit"


def run(command, *arguments, cwd):
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [command, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_a_wheel_brings_the_package_its_configs_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    kept = subprocess.run(["git", "ls-files", "jexit", "convert"], cwd=ROOT, capture_output=True)
    assert set(kept.stdout.decode().split()) <= set(names)  # none where there is no git
    assert {name.split("/")[0] for name in names} == {
        *("jexit", "convert"), f"{wheel.name.split('-py3')[0]}.dist-info",
    }  # fmt: skip
    brought = {name for name in names if name.startswith("jexit/configs/")}
    assert brought == {f"jexit/configs/{file.name}" for file in (ROOT / "configs").glob("*.py")}
    assert wheel.stat().st_size < MOST_BYTES


def test_two_updates_and_a_report_in_an_empty_folder(command, tmp_path):
    small = ("--config.steps=2", "--config.batch_size=2", "--config.rl.rollouts=2",
             "--config.eval.problems=4", "--config.rl.max_new_tokens=8")  # fmt: skip
    code, _, error = run(command, "--config=configs/rl.py", "--workdir=run", *small, cwd=tmp_path)
    assert code == 0, error
    (tmp_path / "run" / "report.html").unlink()
    code, printed, error = run(command, "report", "run", cwd=tmp_path)
    assert code == 0 and "Wrote run/report.html" in printed, error
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_commands_are_found_or_refused(capsys):
    assert cli.main([]) == 0
    listed = capsys.readouterr().out
    for name in cli.MODULES:
        assert f"jexit {name} " in listed
        own = name in ("sweep", "compare")  # reads its arguments itself
        with pytest.MonkeyPatch.context() if own else pytest.raises(SystemExit):
            assert cli.main([*name.split(), "--help"]) == 0
        assert len(capsys.readouterr().out) > 100
    for wrong, hint in (("repport", "did you mean report?"), ("x", "use one of report, ")):
        assert cli.main([wrong]) == 1
        assert hint in capsys.readouterr().err
    assert cli.main(["convert"]) == 1
    assert cli.main(["--config=nowhere.py"]) == 1
    assert re.search(r"nowhere\.py does not exist", capsys.readouterr().err)
