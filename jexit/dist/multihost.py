"""Several processes as one run: startup, exchange of small values, and waits with a timeout.

A *host* is one process of JAX's distributed runtime. Every host runs the same program. Each host
prepares, verifies and records its own rows; the primary host (number 0) writes the files shared by
all hosts. Every wait for other hosts has a timeout, and the error message after a timeout names the
place in the run where the host waited.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jexit.errors import HOST_LOST, RunEnded, UserError

TIMEOUT_SECONDS = 600
MAX_TIMEOUT_SECONDS = 86_400
POLL_SECONDS = 1.0
# JAX's own checks end a process without a message about the run, so they come after ours.
MARGIN_SECONDS = 60
CLIENT_SECONDS = 5.0
# Where JAX's own code is while it traces, lowers or compiles.
_COMPILING = tuple(
    os.path.join("jax", "_src", *path)
    for path in (("compiler.py",), ("interpreters", "mlir.py"), ("interpreters", "partial_eval.py"))
)
_LINE_BYTES = 2**20  # the limit of a message that is sent before JAX's own runtime starts
_REACHABLE = "start every host, and make sure that they can reach each other's ports"

_settings = {"timeout": float(TIMEOUT_SECONDS), "place": "the start of the run"}
_numbers = itertools.count()


class HostLost(RunEnded):
    """Raised if another host is late or was lost; the message says where this host waited."""

    exit_code = HOST_LOST


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: float = TIMEOUT_SECONDS,
) -> None:
    """Connects the hosts of this run; does nothing in a process that runs alone.

    On Cloud TPU, under SLURM with several tasks and under Open MPI, JAX finds the other hosts.
    Elsewhere all arguments are needed: `coordinator` is HOST:PORT of process 0, `processes` the
    number of processes, and `process` the number of this process. Must be called before the first
    computation. `timeout`, in seconds, also limits every later wait for other hosts.

    Raises UserError if the arguments contradict each other or those of another host, or if the port
    cannot be opened. Raises HostLost if other hosts do not arrive in time.
    """
    if not 1 <= timeout <= MAX_TIMEOUT_SECONDS:
        raise UserError(
            f"--host_timeout is {timeout:g}, but it must be from 1 to {MAX_TIMEOUT_SECONDS} "
            "seconds; set it to a number in this range"
        )
    _settings["timeout"] = timeout
    given = (coordinator, processes, process)
    if given == (None, None, None):
        if not _cluster_present():
            return
    elif None in given:
        names = ("--coordinator", "--processes", "--process")
        missing = next(name for name, value in zip(names, given, strict=True) if value is None)
        raise UserError(
            f"{missing} is missing, but --coordinator, --processes and --process belong together; "
            "set all three or none"
        )
    elif not (found := re.fullmatch(r".+:(\d{1,5})", coordinator)) or not 0 < int(found[1]) < 2**16:
        raise UserError(
            f"--coordinator is {coordinator!r}, but it must be HOST:PORT of process 0, with a port "
            "from 1 to 65535; set it to an address such as host0:1234"
        )
    elif processes < 2:
        raise UserError(
            f"--processes is {processes}, but it must be at least 2; to run one process, leave out "
            "--coordinator, --processes and --process"
        )
    elif not 0 <= process < processes:
        raise UserError(
            f"--process is {process}, but with --processes={processes} it must be from 0 to "
            f"{processes - 1}; give each process its own number"
        )
    if coordinator:
        _call_roll(coordinator, processes, process, timeout)
    # JAX's service would handle SIGTERM itself. Here the hosts exchange their signals after each
    # step; before the first step a signal ends the process, as it does on a single host.
    jax.config.update("jax_enable_preemption_service", False)
    patience = int(timeout) + MARGIN_SECONDS
    timer = threading.Timer(timeout + 5, _nobody_came, (process, processes))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            # With a given address JAX must not detect a cluster: under SLURM it would assume one
            # device per task.
            cluster_detection_method="deactivate" if coordinator else None,
            initialization_timeout=patience,
            heartbeat_timeout_seconds=patience,
            shutdown_timeout_seconds=patience,
        )
    except ValueError as error:
        if coordinator:
            raise
        if _task_of_several():
            raise UserError(
                "this is one of several tasks, but JAX cannot find their coordinator "
                f"({_first_line(error)}); set --coordinator, --processes and --process"
            ) from error
        # This TPU is not part of a slice: JAX found no other host.
    except RuntimeError as error:
        place = coordinator or "the address that the cluster names"
        raise _no_coordinator(process, place, timeout, error) from error
    finally:
        timer.cancel()


def _call_roll(coordinator: str, processes: int, process: int, timeout: float) -> None:
    """Makes all processes connect to the coordinator and compare their values of `processes`.

    JAX itself does not compare the values, ends a process if the port never opens, and crashes on
    process 0 if the port is in use. Raises UserError if the values differ or the port is in use,
    and HostLost if a process does not arrive in time.
    """
    if process == 0:
        told = _hear_all(coordinator, processes, timeout)
    else:
        told = _report(coordinator, processes, process, timeout)
    if set(told.values()) != {processes}:
        said = ", ".join(f"{count} on process {one}" for one, count in sorted(told.items()))
        raise UserError(
            f"--processes is {said}, but it must be the same on every process; set it to the total "
            "number of processes"
        )
    if missing := set(range(processes)) - told.keys():
        raise HostLost(
            f"process {process} of {processes} waited {timeout:g} s, but not all others arrived "
            f"(missing: {', '.join(map(str, sorted(missing)))}); {_REACHABLE}"
        )


def _hear_all(coordinator: str, processes: int, timeout: float) -> dict[int, int]:
    """Collects, on process 0, each process's value of `--processes`; returns {process: value}.

    Stops when all have reported, when a value differs, or after `timeout` seconds; then sends all
    values to the processes that have reported.
    """
    told, others = {0: processes}, []
    end = time.monotonic() + timeout
    with contextlib.ExitStack() as opened:
        server = opened.enter_context(_listening(int(coordinator.rpartition(":")[2])))
        while len(told) < processes and set(told.values()) == {processes}:
            server.settimeout(max(end - time.monotonic(), 0.0))
            try:
                other = opened.enter_context(server.accept()[0])
            except OSError:  # the time is over
                break
            with contextlib.suppress(OSError, ValueError, TypeError):  # not one of the processes
                other.settimeout(CLIENT_SECONDS)
                one, count = _receive(other)
                told[int(one)] = int(count)
                others.append(other)
        for other in others:
            with contextlib.suppress(OSError):
                _send(other, list(told.items()))
    return told


def _report(coordinator: str, processes: int, process: int, timeout: float) -> dict[int, int]:
    """Sends this process's `--processes` to process 0; returns {process: value} of all.

    Raises HostLost if process 0 does not answer within `timeout` seconds.
    """
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        left = max(end - time.monotonic(), POLL_SECONDS)
        try:
            with socket.create_connection((host.strip("[]"), int(port)), left) as connection:
                _send(connection, [process, processes])
                connection.settimeout(left + CLIENT_SECONDS)  # process 0 may end a little later
                return dict(_receive(connection))
        except (OSError, ValueError, TypeError) as error:  # no server, or another one
            if time.monotonic() + POLL_SECONDS > end:
                raise _no_coordinator(process, coordinator, timeout, error) from error
        time.sleep(POLL_SECONDS)


def _listening(port: int) -> socket.socket:
    """Opens a server socket on every address of this machine, as JAX's coordinator does."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"--coordinator names port {port}, which process 0 cannot open "
            f"({os.strerror(error.errno)}); choose a port that is free on its host"
        ) from error


def _send(connection: socket.socket, value: Any) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


def _receive(connection: socket.socket) -> Any:
    with connection.makefile("rb") as lines:
        return json.loads(lines.readline(_LINE_BYTES))


def _no_coordinator(
    process: int | None, place: str, timeout: float, error: BaseException
) -> HostLost:
    return HostLost(
        f"process {'?' if process is None else process} found no coordinator at {place} within "
        f"{timeout:g} s ({_first_line(error)}); {_REACHABLE}"
    )


def _nobody_came(process: int | None, processes: int | None) -> None:
    who = "a process" if process is None else f"process {process} of {processes}"
    print(
        f"jexit: {who} waited {_settings['timeout']:g} s, but not all others arrived; {_REACHABLE}",
        file=sys.stderr,
    )
    leave(HOST_LOST)


def _task_of_several() -> bool:
    """Returns whether SLURM or Open MPI started this process as one of several tasks of a job."""
    if "OMPI_MCA_orte_hnp_uri" in os.environ:
        return True
    # srun sets this for the step that it starts; the batch script itself is not part of a step.
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def _cluster_present() -> bool:
    """Returns whether there may be other processes that JAX can find without arguments."""
    if _task_of_several():
        return True
    if os.environ.get("JAX_PLATFORMS", "tpu") == "cpu" or not importlib.util.find_spec("libtpu"):
        return False
    # On a slice JAX finds the others in the environment (GKE) or in the machine's metadata.
    return any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0")))


def several_hosts() -> bool:
    return jax.process_count() > 1


def is_primary() -> bool:
    """Returns whether this is host 0, the only host that writes files shared by all hosts."""
    return jax.process_index() == 0


def gather(place: str, value: Any) -> list[Any]:
    """Returns the `value` of every host, a JSON value, as a list ordered by process index.

    `place` names this call in error messages. The values go through JAX's coordinator and not
    through the devices, so the call does not wait for computations. Raises HostLost if a host does
    not arrive within the timeout.
    """
    if not several_hosts():
        return [value]
    client = ocp.multihost.get_jax_distributed_client()
    number, index = next(_numbers), jax.process_index()
    folder = f"jexit/gather/{number}/"
    with waiting(place):
        try:
            client.key_value_set(f"{folder}{index}", json.dumps(value))
            client.wait_at_barrier(f"jexit/{number}", int(_settings["timeout"] * 1000))
            pairs = client.key_value_dir_get(folder)
        except jax.errors.JaxRuntimeError as error:
            raise _lost(place, error) from error
        # Every host that is past this barrier has read the values of the previous call.
        if number > 0 and index == 0:
            client.key_value_delete(f"jexit/gather/{number - 1}/")
    values = {int(key.rpartition("/")[2]): text for key, text in pairs}
    assert sorted(values) == list(range(jax.process_count())), values.keys()
    return [json.loads(values[host]) for host in sorted(values)]


def from_primary(place: str, value: Any) -> Any:
    """Returns the primary host's `value`, a JSON value, on every host.

    `place` names this call in error messages.
    """
    return gather(place, value if is_primary() else None)[0]


def barrier(place: str) -> None:
    """Waits until every host has reached this call.

    `place` names this call in error messages. Raises HostLost if a host does not arrive within the
    timeout.
    """
    gather(place, None)


@contextlib.contextmanager
def waiting(place: str) -> Iterator[None]:
    """Ends the process if the code in this context takes longer than the timeout.

    `place` names the wait in the message on stderr. The timeout is for waits that have none of
    their own: a collective with a host that hangs never returns, and neither does a jitted call
    that the runtime delays until earlier collectives are done. If JAX is compiling at the end of
    the timeout, the timeout starts anew, because compiling may take long and involves no other
    host.
    """
    if not several_hosts():
        yield
        return
    before, _settings["place"] = _settings["place"], place
    over = threading.Event()
    threading.Thread(target=_watch, args=(place, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
    _settings["place"] = before  # after an error the place stays set, for `ended`


def _watch(place: str, over: threading.Event) -> None:
    # A client's own timeout comes first, because its error names the missing hosts.
    while not over.wait(_settings["timeout"] + CLIENT_SECONDS):
        if not any(frame.filename.endswith(_COMPILING) for frame in _main_stack()):
            _give_up(place)


def _main_stack() -> traceback.StackSummary:
    frame = sys._current_frames().get(threading.main_thread().ident)
    return traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False)


def whole(tree: Any, place: str) -> Any:
    """Returns each array of `tree` in full, as a NumPy array on every host.

    The arrays must be small. `place` names this call in error messages.
    """
    with waiting(place):
        return jax.tree.map(_whole, tree)


def _whole(array: jax.Array) -> Any:
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return jax.device_get(array)
    return multihost_utils.process_allgather(array, tiled=True)


def arrays_from_primary(place: str, tree: Any) -> Any:
    """Returns the primary host's `tree` of NumPy arrays on every host.

    The arrays must be small and have the same shapes and dtypes on every host. `place` names this
    call in error messages.
    """
    if not several_hosts():
        return tree
    with waiting(place):
        return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def ended(error: BaseException) -> str | None:
    """Returns the message for the user if `error` was caused by the loss of a host, else None."""
    if isinstance(error, HostLost):
        return str(error)
    lost = re.search(
        r"Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|peer|heartbeat|coordination", str(error)
    )
    from_runtime = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
    if several_hosts() and lost and from_runtime:
        return str(_lost(_settings["place"], error))
    return None


def leave(code: int) -> None:
    """Ends this process with exit code `code`, without JAX's shutdown barrier.

    The barrier would wait for hosts that are gone. Unless `code` stands for a lost host, the
    primary host ends last: JAX's coordinator ends with it, and a host that loses the coordinator is
    aborted before it can print why it stops.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code != HOST_LOST:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # a host may leave without a report
            _say_goodbye()
    os._exit(code)


def _say_goodbye() -> None:
    """Tells the primary host that this host leaves; the primary host waits for all the others.

    It waits for at most CLIENT_SECONDS.
    """
    client = ocp.multihost.get_jax_distributed_client()
    if not is_primary():
        client.key_value_set(f"jexit/left/{jax.process_index()}", "")
        return
    end = time.monotonic() + CLIENT_SECONDS
    for other in range(1, jax.process_count()):
        left = max(end - time.monotonic(), 0.001)
        client.blocking_key_value_get(f"jexit/left/{other}", int(1000 * left))


def _lost(place: str, error: BaseException) -> HostLost:
    text = str(error)
    missing = re.search(r"Some timed out task names:\s*((?:\d+\s*)+)", text)
    who = f"host {', '.join(missing.group(1).split())}" if missing else "another host"
    late = "did not arrive within" if missing else "was lost while this host waited up to"
    return HostLost(
        f"host {jax.process_index()} of {jax.process_count()} stops at {place}: {who} {late} "
        f"{_settings['timeout']:g} s ({_first_line(error)}); run the same command on every host "
        "to continue from the newest checkpoint"
    )


def _give_up(place: str) -> None:
    message = (
        f"jexit: host {jax.process_index()} of {jax.process_count()} stops at {place}: the other "
        f"hosts did not respond within {_settings['timeout']:g} s; run the same command on every "
        "host to continue from the newest checkpoint"
    )
    print(message, file=sys.stderr)
    sys.stderr.writelines(reversed(_main_stack().format()))
    leave(HOST_LOST)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
