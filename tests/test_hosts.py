"""Several processes that talk over loopback are one run: same metrics, files once, no hanging."""

import fcntl
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from small_runs import assert_same_model, measured, metrics, saved_small_model, small_settings

ROOT = pathlib.Path(__file__).parents[1]
INTERRUPTED, LOST = 3, 4
RELATIVE = 1e-5  # of losses and parameters: two processes add up in another order


# Calibration with both phases: the fit adds up over devices and hosts too.
PHASES = {
    "exits__continuation": "linear",
    "sft__lens_steps": 2,
    "sft__pool": 32,  # the fit takes as many at a time on any number of devices here
    "sft__generate_batch": 8,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return saved_small_model(tmp_path_factory.mktemp("model") / "model")


def arguments(command, model_dir, workdir, **settings):
    """The flags of a small run over two devices."""
    settings = small_settings(model_dir, **({"mesh__fsdp": 2} | settings))
    return [
        f"--config={ROOT}/configs/{command}.py",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]


def start(flags, *, devices=2, hosts=1, timeout=60):
    """Starts every host of a run; their output goes to HOST.log in the workdir's parent."""
    workdir = pathlib.Path(next(f for f in flags if f.startswith("--workdir=")).partition("=")[2])
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // hosts} "
        "--xla_cpu_multi_thread_eigen=false",
        "PYTHONPATH": f"{ROOT}",
    }
    processes = []
    for host in range(hosts):
        log = workdir.parent / f"{workdir.name}.host{host}"
        joining = [f"--coordinator={address}", f"--processes={hosts}", f"--process={host}"]
        command = [sys.executable, "tests/host_process.py", f"{log}.verified", *flags]
        command += [f"--host_timeout={timeout}", *(joining if hosts > 1 else [])]
        with open(f"{log}.log", "w") as output:
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
            )
    return processes, [workdir.parent / f"{workdir.name}.host{host}" for host in range(hosts)]


def finish(processes, logs, seconds=400):
    """Waits for all; returns exit codes and what they wrote."""
    codes = [process.wait(seconds) for process in processes]
    return codes, [pathlib.Path(f"{log}.log").read_text() for log in logs]


def run(*args, **options):
    codes, texts = finish(*start(*args, **options))
    assert set(codes) == {0}, "\n".join(texts)
    return texts


def wait_for_steps(workdir, steps, processes, seconds=300):
    """Waits until the run has logged so many steps."""
    path, end = workdir / "metrics.jsonl", time.monotonic() + seconds
    while time.monotonic() < end:
        assert all(process.poll() is None for process in processes), "a host ended early"
        if path.exists() and path.read_text().count("\n") >= steps:
            return
        time.sleep(0.1)
    raise AssertionError(f"no {steps} steps in {seconds} s")


def assert_same_run(one, two, sampler_gap=1e-7):
    """`sampler_gap` is of that metric and the loss, differences of log-probabilities: rounding."""
    for ours, theirs in zip(metrics(one), metrics(two), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            signed = name == "sampler_gap" or name.startswith("loss")
            least = sampler_gap if signed else 1e-7
            np.testing.assert_allclose(theirs[name], value, RELATIVE, least, err_msg=name)
    assert_same_model(one / "model", two / "model", RELATIVE, 1e-6)
    assert measured(one) == measured(two)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["rl", "sft"])
def test_two_hosts_are_one_run(command, model_dir, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    # A blend's own metrics verify every text on every host.
    of_sums = {"task__name": "sums", "steps": 2, "log__samples_every": 1}
    of_sums |= PHASES if command == "sft" else {}
    run(arguments(command, model_dir, one, **of_sums))
    texts = run(arguments(command, model_dir, two, **of_sums), hosts=2)
    assert_same_run(one, two)
    assert "before" in texts[0] and "before" not in texts[1]  # the closing table, once
    samples = [len((w / "samples.jsonl").read_text().splitlines()) for w in (one, two)]
    assert command == "sft" or samples[1] == samples[0] == 4
    verified = [
        sorted((tmp_path / f"two.host{host}.verified").read_text().splitlines())
        for host in range(2)
    ]
    alone = sorted((tmp_path / "one.host0.verified").read_text().splitlines())
    assert sorted(verified[0] + verified[1]) == alone  # nothing twice, nothing left out
    assert len(verified[0]) and abs(len(verified[0]) - len(verified[1])) <= 4
    if command == "sft":
        files = sorted(p.name for p in (two / "teacher").rglob("host-*.jsonl"))
        assert files == ["host-0.jsonl", "host-1.jsonl"]


@pytest.mark.slow
def test_prompts_need_not_divide_over_the_shards(model_dir, tmp_path):
    """Two prompts on four data shards: their completions do divide."""
    one, two = tmp_path / "one", tmp_path / "two"
    settings = {"mesh__data": 4, "mesh__fsdp": 1, "batch_size": 2, "rl__rollouts": 2}
    run(arguments("rl", model_dir, one, **settings), devices=4)
    run(arguments("rl", model_dir, two, **settings), devices=4, hosts=2)
    assert_same_run(one, two, sampler_gap=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "rl"])
def test_a_run_goes_on_with_other_numbers_of_devices(command, model_dir, tmp_path):
    """On eight devices, then one, then two: the figures and parameters of one that never moved."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    # A schedule that ends with the run would give a shorter turn other learning rates.
    constant = {"optim__schedule": "constant"}
    if command == "sft":  # of which the heads' phase comes last, and steps grow from turn to turn
        constant |= PHASES | {"sft__lens_steps": 0}
    run(arguments(command, model_dir, whole, steps=6, mesh__fsdp=1, **constant), devices=1)
    turns = [(2, 8, (2, 2, 2)), (4, 1, (1, 1, 1)), (6, 2, (1, 2, 1))]
    for steps, devices, (data, fsdp, tensor) in turns:
        mesh = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__tensor": tensor} | constant
        run(arguments(command, model_dir, moved, steps=steps, **mesh), devices=devices)
    for ours, theirs in zip(metrics(whole), metrics(moved), strict=True):
        for name in ("loss", "kl/teacher", "depth/fraction", "grad_norm"):
            np.testing.assert_allclose(theirs[name], ours[name], 1e-4, 1e-5, err_msg=name)
    assert_same_model(whole / "model", moved / "model", 1e-4, 1e-5)


# Of which a step takes the least time to compile.
TRUNK = {"pretrain__layers": 3, "pretrain__width": 16, "pretrain__mlp_width": 24}


@pytest.mark.parametrize(
    ("command", "victim", "number"),
    [
        ("pretrain", 1, signal.SIGKILL),
        *(
            pytest.param("rl", *case, marks=pytest.mark.slow)
            for case in ((0, signal.SIGKILL), (0, signal.SIGSTOP), (1, signal.SIGSTOP))
        ),
    ],
)
def test_a_host_that_is_killed_or_hangs_ends_the_other_with_a_message(
    command, victim, number, model_dir, tmp_path
):
    settings = TRUNK if command == "pretrain" else {}
    flags = arguments(command, model_dir, tmp_path / "run", steps=10_000, **settings)
    processes, logs = start(flags, hosts=2, timeout=15)
    wait_for_steps(tmp_path / "run", 2, processes)
    processes[victim].send_signal(number)
    began, other = time.monotonic(), 1 - victim
    try:
        code = processes[other].wait(60)
    finally:
        for process in processes:
            process.kill()
    assert time.monotonic() - began < 30
    text = pathlib.Path(f"{logs[other]}.log").read_text()
    if victim == 0 and code == -signal.SIGABRT:  # JAX's own watch over the coordinator was first
        assert "another task died" in text
        return
    assert code == LOST
    assert f"jexit: host {other} of 2 stops at " in text
    assert "run the same command on every host" in text and "Traceback" not in text


@pytest.mark.slow
def test_a_signal_before_training_ends_a_host_and_then_the_others(model_dir, tmp_path):
    """While the teacher writes there is nothing to save: SIGTERM does what it does alone."""
    settings = {"sft__pool": 4000, "sft__max_new_tokens": 64}
    flags = arguments("sft", model_dir, tmp_path / "run", **settings)
    processes, logs = start(flags, hosts=2, timeout=30)
    end = time.monotonic() + 200
    while "teacher trajectories" not in pathlib.Path(f"{logs[0]}.log").read_text():
        assert time.monotonic() < end and processes[0].poll() is None
        time.sleep(0.2)
    processes[1].terminate()
    assert processes[1].wait(10) == -signal.SIGTERM
    assert processes[0].wait(90) == LOST


@pytest.mark.slow
def test_a_signal_to_one_host_saves_all_and_one_process_can_go_on(model_dir, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = {"steps": 12, "checkpoint__every": 5}
    run(arguments("rl", model_dir, whole, **settings), hosts=2)
    flags = arguments("rl", model_dir, cut, **settings)
    processes, logs = start(flags, hosts=2)
    wait_for_steps(cut, 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, texts = finish(processes, logs)
    assert codes == [INTERRUPTED, INTERRUPTED], "\n".join(texts)
    assert "stopped by SIGTERM after step" in texts[0]
    run(flags)  # one process with both devices
    assert_same_run(whole, cut)


@pytest.mark.slow
def test_a_second_run_in_a_workdir_ends_on_every_host(model_dir, tmp_path):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("process 7 on elsewhere", end="", file=lock, flush=True)
        codes, texts = finish(*start(arguments("rl", model_dir, tmp_path / "run"), hosts=2))
    assert codes == [1, 1]
    for text in texts:
        assert "run is in use by process 7 on elsewhere; wait for that run, stop it, or" in text
        assert "Traceback" not in text
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_hosts_that_cannot_meet_are_one_sentence(model_dir, tmp_path):
    """A mistake is exit 1, which launch scripts do not take for a run to go on with.

    tests/dist has each case in one process.
    """
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            ("9", 1, 1, LOST, "found no coordinator at 127.0.0.1:9 within 1 s"),
            (port, 0, 60, 1, f"jexit: --coordinator names port {port}, which process 0 cannot"),
        ]
        started = []
        for number, (at, process, timeout, *_) in enumerate(cases):
            flags = arguments("rl", model_dir, tmp_path / f"{number}" / "run")
            flags += [f"--coordinator=127.0.0.1:{at}", "--processes=2"]
            started.append(start([*flags, f"--process={process}"], timeout=timeout))
        for number, (*_, code, words) in enumerate(cases):
            codes, (text,) = finish(*started[number])
            assert codes == [code] and words in text and "Traceback" not in text
            assert not (tmp_path / f"{number}" / "run").exists()
