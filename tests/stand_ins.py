"""Stand-ins for gcloud, xpk and Slurm: they write down their arguments and play a small cluster.

`StandIns` puts executables of those names into a directory for the front of the PATH. A host of the
cluster is a directory, which is its home: what a launch script runs "on a worker" is really run
there, down to a `python` whose `-m jexit.main` ends as the test has planned.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
PYTHONS = ("python3", "python3.11", "python3.12", "python3.13")
NAMES = (
    *("gcloud", "xpk", "sbatch", "srun", "scontrol"),
    *("gcsfuse", "mountpoint", "mount", "mount.nfs", "sudo", "nvidia-smi", *PYTHONS),
)
JOB_ID = 4711


def write_executable(path: pathlib.Path, name: str, directory: str | pathlib.Path) -> None:
    """One whose calls are played in the directory."""
    path.write_text(
        f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        f"import stand_ins\nsys.exit(stand_ins.play({name!r}, {str(directory)!r}))\n"
    )
    path.chmod(0o755)


class StandIns:
    """A cluster of `hosts` that plays what `plan` says.

    Plans: `node` and `request`, the states of a TPU slice and of its queued resource; `states` and
    `requests`, what describing them says first; `create_errors`; `jobs`, for each host how its runs
    end, one after the other (an exit code, `preempt` or `wait` for SIGTERM). `unreachable` and
    `broken` count connections that fail before a run begins, and after.
    """

    def __init__(self, directory: pathlib.Path, hosts: int = 2) -> None:
        self.directory, self.hosts = directory, hosts
        self.bin = directory / "bin"
        self.bin.mkdir(parents=True)
        for name in NAMES:
            write_executable(self.bin / name, name, directory)
        self.plan(hosts=hosts, node="ABSENT", request="ABSENT")

    def plan(self, **plans: Any) -> None:
        with stage(self.directory) as now:
            now.update(plans)

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of every call of a command; `jexit` is what the runs were given."""
        return [call["args"] for call in self.records() if call["name"] == name]

    def records(self) -> list[dict[str, Any]]:
        path = self.directory / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def environment(self, **more: str) -> dict[str, str]:
        home = self.directory / "home"
        home.mkdir(exist_ok=True)
        return {
            "PATH": f"{self.bin}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(home),
            "TMPDIR": str(home),
            "JEXIT_POLL_SECONDS": "0.1",
            **more,
        }

    def start(self, script: str | pathlib.Path, *args: str, **env: str) -> subprocess.Popen[str]:
        # A shell's background jobs, perhaps these tests, ignore interrupts and pass that on.
        as_from_a_terminal = ["env", "--default-signal=INT"]
        return subprocess.Popen(
            [*as_from_a_terminal, "bash", str(ROOT / "launch" / script), *map(str, args)],
            cwd=self.directory,
            env=self.environment(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that a test can signal all of it, as a terminal does
        )

    def run(self, script: str | pathlib.Path, *args: str, **env: str):
        """Runs a launch script to its end."""
        process = self.start(script, *args, **env)
        output, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def waits_for(self, name: str, seconds: float = 60) -> None:
        """Waits until so many hosts as there are have a file of that name at home."""
        end = time.monotonic() + seconds
        while len(list((self.directory / "hosts").glob(f"*/{name}"))) < self.hosts:
            assert time.monotonic() < end, f"no {name} on the hosts"
            time.sleep(0.05)


@contextlib.contextmanager
def stage(directory: str | pathlib.Path) -> Iterator[dict[str, Any]]:
    """What is planned and what has come of it, for one process at a time."""
    path = pathlib.Path(directory) / "stage.json"
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        now = json.loads(path.read_text()) if path.exists() else {}
        yield now
        path.write_text(json.dumps(now))


def play(name: str, directory: str) -> int:
    """Plays one call of a stand-in."""
    args, env = sys.argv[1:], os.environ
    with stage(directory), open(f"{directory}/calls.jsonl", "a") as calls:
        print(json.dumps({"name": name, "args": args, "cwd": os.getcwd()}), file=calls)
    if name in PYTHONS or name == "python":
        return _python(args, directory)
    if name == "sudo":
        return subprocess.call(args)
    if name in ("mountpoint", "nvidia-smi"):  # not mounted yet; no GPU
        return 1
    players = {"gcloud": _gcloud, "sbatch": _sbatch, "srun": _srun, "scontrol": _scontrol}
    return players[name](args, directory, dict(env)) if name in players else 0


def _flag(args: list[str], name: str) -> str:
    return next((a.partition("=")[2] for a in args if a.startswith(f"--{name}=")), "")


def _home(directory: str, host: int | str) -> pathlib.Path:
    path = pathlib.Path(directory) / "hosts" / str(host)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _gcloud(args: list[str], directory: str, env: dict[str, str]) -> int:
    kind, verb = args[2:4]
    if args[:2] == ["storage", "rsync"]:
        return 0
    if verb == "describe":
        return _describe("node" if kind == "tpu-vm" else "request", directory)
    if verb == "create":
        with stage(directory) as now:
            if errors := now.get("create_errors"):
                print(f"ERROR: {errors.pop(0)}", file=sys.stderr)
                return 1
            now["node"] = f"READY {_flag(args, 'accelerator-type')}"
            now["request"] = "ACTIVE"
    if verb == "start":
        with stage(directory) as now:
            now["node"] = now["node"].replace("STOPPED", "READY")
    if verb == "delete":
        shutil.rmtree(f"{directory}/hosts", ignore_errors=True)
        with stage(directory) as now:
            now["node"] = now["request"] = "ABSENT"
    if verb == "scp":
        return _scp(args, directory)
    if verb == "ssh":
        return _ssh(args, directory, env)
    return 0


def _describe(what: str, directory: str) -> int:
    with stage(directory) as now:
        first = now.get("states" if what == "node" else "requests")
        state = first.pop(0) if first else now[what]
    if state == "ABSENT":
        print("ERROR: (gcloud) NOT_FOUND: Resource was not found", file=sys.stderr)
        return 1
    if state == "DENIED":
        print("ERROR: (gcloud) PERMISSION_DENIED: no", file=sys.stderr)
        return 1
    print(state)
    return 0


def _hosts(args: list[str], directory: str) -> list[pathlib.Path]:
    worker = _flag(args, "worker")
    with stage(directory) as now:
        count = now["hosts"]
    return [_home(directory, h) for h in (range(count) if worker == "all" else [worker])]


def _scp(args: list[str], directory: str) -> int:
    source, target = args[4:6]
    for home in _hosts(args, directory):
        if ":" in source:
            shutil.copy(home / source.partition(":")[2], target)
        else:
            shutil.copy(source, home / target.partition(":")[2])
    return 0


def _ssh(args: list[str], directory: str, env: dict[str, str]) -> int:
    follows = "follow" in _flag(args, "command")
    with stage(directory) as now:
        unreachable, broken = (
            follows and now.get(plan, 0) > 0 for plan in ("unreachable", "broken")
        )
        if unreachable or broken:
            now["unreachable" if unreachable else "broken"] -= 1
    if unreachable:
        return 255
    started = [
        subprocess.Popen(
            ["bash", "-c", _flag(args, "command")], cwd=home, env=env | {"HOME": str(home)}
        )
        for home in _hosts(args, directory)
    ]
    if broken:  # the connection breaks when the runs have begun
        time.sleep(2)
        for process in started:
            process.kill()
    codes = [process.wait() for process in started]
    return max(abs(code) for code in codes)


def _python(args: list[str], directory: str) -> int:
    """A Python that can make environments, and whose pip installs nothing."""
    if args[:2] == ["-m", "venv"]:
        target = pathlib.Path(args[2]) / "bin"
        target.mkdir(parents=True)
        write_executable(target / "python", "python", directory)
    if args[:2] == ["-m", "jexit.main"]:
        return _job(args[2:], directory)
    return 0


def _job(args: list[str], directory: str) -> int:
    host = pathlib.Path(os.environ["HOME"]).name
    variables = {k: v for k, v in os.environ.items() if k.startswith("TEST_")}
    with stage(directory) as now, open(f"{directory}/calls.jsonl", "a") as calls:
        record = {"name": "jexit", "args": args, "cwd": os.getcwd(), "host": host}
        print(json.dumps(record | {"env": variables}), file=calls)
        plans = now.get("jobs", {}).get(host)
        end = plans.pop(0) if plans else 0
        if end == "preempt":
            now["node"] = "PREEMPTED"
    print(f"a run on host {host}", flush=True)
    if end == "preempt":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "wait":
        return _wait_for_signals()
    return end


def _wait_for_signals() -> int:
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda n, _: received.append(n))
    home = pathlib.Path(os.environ["HOME"])
    (home / "waiting").touch()
    end = time.monotonic() + 60
    while not received and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.5)  # for a second one
    (home / "signals").write_text(" ".join(signal.Signals(n).name for n in received))
    (home / "waiting").unlink()
    return 3


def _sbatch(args: list[str], directory: str, env: dict[str, str]) -> int:
    """Runs the batch script, again whenever it has queued itself again."""
    start = next(i for i, a in enumerate(args) if not a.startswith("-"))
    script = shutil.copy(args[start], f"{directory}/slurm_script")
    nodes = _flag(args, "nodes")
    count = 0
    while True:
        with stage(directory) as now:
            now["requeued"] = False
        env |= {
            "SLURM_JOB_ID": str(JOB_ID),
            "SLURM_JOB_NUM_NODES": nodes,
            "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
            "SLURM_RESTART_COUNT": str(count),
        }
        process = subprocess.Popen(["bash", script, *args[start + 1 :]], env=env)
        _play_signal(process, directory)
        code = process.wait()
        with stage(directory) as now:
            if not now["requeued"]:
                break
        count += 1
    print(JOB_ID)
    return code


def _play_signal(process: subprocess.Popen[bytes], directory: str) -> None:
    """Sends the batch script its signal once all hosts wait for one; the tasks get a TERM too."""
    with stage(directory) as now:
        name, hosts = now.pop("slurm_signal", None), now["hosts"]
    if not name:
        return
    waiting: list[pathlib.Path] = []
    while len(waiting) < hosts and process.poll() is None:
        waiting = list(pathlib.Path(directory, "hosts").glob("*/waiting"))
        time.sleep(0.05)
    process.send_signal(signal.Signals[name])
    if name == "SIGTERM":
        with stage(directory) as now:
            tasks = now["tasks"]
        for task in tasks:
            os.kill(task, signal.SIGTERM)


def _srun(args: list[str], directory: str, env: dict[str, str]) -> int:
    start = next(i for i, a in enumerate(args) if not a.startswith("-"))
    count = int(_flag(args, "ntasks"))
    tasks = [
        subprocess.Popen(
            args[start:],
            env=env
            | {
                "HOME": str(_home(directory, host)),
                "SLURM_NTASKS": str(count),
                "SLURM_PROCID": str(host),
            },
        )
        for host in range(count)
    ]
    with stage(directory) as now:
        now["tasks"] = [task.pid for task in tasks]
    signal.signal(signal.SIGUSR1, lambda n, _: [task.send_signal(n) for task in tasks])
    return max(abs(task.wait()) for task in tasks)


def _scontrol(args: list[str], directory: str, env: dict[str, str]) -> int:
    if args[:2] == ["show", "hostnames"]:
        with stage(directory) as now:
            print("\n".join(f"node{i + 1}" for i in range(now["hosts"])))
    if args[0] == "requeue":
        with stage(directory) as now:
            now["requeued"] = True
    return 0
