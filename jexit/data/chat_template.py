"""Chat templates, rendered in a child process that the kernel stops if a template exceeds a limit.

A chat template is a program written by the publisher of a checkpoint. Jinja's sandbox protects the
interpreter from the template, but the template can still run forever or fill the memory. Nothing
inside a Python process can stop it: a thread cannot be killed, and signal handlers, tracers and
loop counters all wait for an operation such as `10**10**9` or `'x' * 10**11` to return. A child
process therefore renders the templates under two limits that the kernel enforces: processor time
per text, and memory. When the processor time is used up, the kernel ends the child, which closes
the pipe from which this process reads.

One child process, started with the first text, renders all templates. It ends when this process
ends, because its input is then closed.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

SECONDS = 2.0  # of processor time per text; a normal template takes less than a millisecond
MEBIBYTES = 512  # of memory, in addition to the child's memory before it renders
CHARACTERS = 10_000_000  # the most that a rendered text may have
_REASON = 200  # the most characters that a reason may have


def render(template: str, messages: Sequence[Mapping[str, str]], **variables: Any) -> str:
    """Returns the string that a chat template produces for messages (`role`, `content`).

    `variables` are the template's other variables, which must be JSON values, with the names that
    transformers' `apply_chat_template` uses. Raises ValueError, whose message is only the reason,
    if the template is broken, rejects the messages or exceeds a limit.
    """
    request = {"template": template, "messages": list(messages), "variables": variables}
    reply = _child.ask(request | {"seconds": SECONDS})
    if "fault" in reply:
        raise ValueError(reply["fault"])
    return reply["text"]


class _Child:
    """The child process that renders templates, started by the first request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Mapping[str, Any]) -> dict[str, str]:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", __file__],  # -P: files of this directory are no modules
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # only the parent handles signals to its group
                )
            assert self._process.stdin is not None and self._process.stdout is not None
            try:
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
                reply = self._process.stdout.readline()
            except BrokenPipeError:
                reply = b""
            except BaseException:  # Ctrl-C: the next request would otherwise read this reply
                self.stop()
                raise
            if reply:
                return json.loads(reply)
            code = self._process.wait()
            self.stop()
            if code == -signal.SIGPROF:
                return {"fault": f"it takes more than {request['seconds']:g} s of processor time"}
            return {"fault": f"the process that rendered it ended with code {code}"}

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


_child = _Child()
atexit.register(lambda: _child.stop())


def _forget() -> None:
    global _child
    _child = _Child()


os.register_at_fork(after_in_child=_forget)  # the pipe belongs to the parent


def _serve() -> None:
    """Answers each line of JSON on stdin with a line on stdout; runs in the child process."""
    environment = _environment()
    compiled = functools.lru_cache(maxsize=64)(environment.from_string)
    _limit()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        try:
            template = compiled(request["template"])
            text = template.render(
                messages=request["messages"], tools=None, documents=None, **request["variables"]
            )
            if len(text) > CHARACTERS:
                raise ValueError(f"it writes more than {CHARACTERS:,} characters")
            reply = {"text": text}
        except Exception as error:  # a template can raise whatever Python can
            reply = {"fault": _fault(error)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


def _limit() -> None:
    import resource

    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + MEBIBYTES * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _environment() -> Any:
    import datetime

    import jinja2.ext
    import jinja2.sandbox

    class GenerationBlock(jinja2.ext.Extension):
        """Renders the contents of `{% generation %}` blocks, which training tools use."""

        tags = frozenset(("generation",))

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """A Jinja namespace that hides Python's internals: no name may start with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args
            for name in (names := dict(*rest, **kwargs)):
                Namespace._check(name)
            jinja2.utils.Namespace.__init__(self, names)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace._check(name)
            super().__setitem__(name, value)

        @staticmethod
        def _check(name: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.sandbox.SecurityError(
                    f"a namespace cannot contain {name!r}; use a name without a leading underscore"
                )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": Namespace,
        "raise_exception": raise_exception,
        # A fixed date, that of Llama 3.2's own template: prompts must not change while a run lasts.
        "strftime_now": lambda form: datetime.date(2024, 7, 26).strftime(form),
    }
    return environment


def _fault(error: Exception) -> str:
    """Returns the reason why a template failed, in one line, with the line number if known."""
    if isinstance(error, MemoryError):
        return f"it takes more than {MEBIBYTES} MiB of memory"
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    reason = " ".join(str(getattr(error, "message", error)).split())[:_REASON].rstrip(".")
    reason = reason or type(error).__name__
    return reason if line is None else f"line {line}: {reason}"


if __name__ == "__main__":
    _serve()
