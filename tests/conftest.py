"""Settings that hold for every test: eight CPU devices, where the real checkpoint lies."""

import atexit
import os
import pathlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator

import hypothesis
import jax
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before JAX first looks for devices, and in this process only: commands that tests start see one.
jax.config.update("jax_num_cpu_devices", 8)
# Here and in the commands that tests start; the variables have their say. Optimising what tests
# compile for a CPU takes longer than running it, and what XLA has compiled once serves all tests.
JAX_SETTINGS: dict[str, bool | int | str] = {}
if os.environ["JAX_PLATFORMS"] == "cpu":
    JAX_SETTINGS["jax_disable_most_optimizations"] = True
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # pytest's workers get that of the first process
    programs = tempfile.mkdtemp(prefix="jexit-programs-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    JAX_SETTINGS["jax_compilation_cache_dir"] = programs
    JAX_SETTINGS["jax_persistent_cache_min_compile_time_secs"] = 0
    JAX_SETTINGS["jax_persistent_cache_min_entry_size_bytes"] = -1
for name, value in JAX_SETTINGS.items():
    if name.upper() not in os.environ:
        jax.config.update(name, value)
        os.environ[name.upper()] = str(int(value)) if isinstance(value, bool) else str(value)
# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module", autouse=True)
def _no_programs_left_behind() -> Iterator[None]:
    """A process may have 65,530 memory mappings on Linux, and compiled programs are made of them.

    One that compiles for all the files here would have more, and XLA would abort.
    """
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _no_module_path_left_behind() -> Iterator[None]:
    """Loading a task file adds its folder, in which a later test would find another's modules."""
    before = [*sys.path]
    yield
    sys.path[:] = before


@pytest.fixture
def deadline() -> Iterator[None]:
    """Fails a test that would otherwise wait or count for ever."""

    def ring(*_: object) -> None:
        pytest.fail("this takes longer than 30 s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def real_checkpoint() -> pathlib.Path:
    """A real checkpoint in Hugging Face format, named by JEXIT_WEIGHTS."""
    path = os.environ.get("JEXIT_WEIGHTS", "")
    if not path:
        pytest.skip("JEXIT_WEIGHTS names no checkpoint directory")
    return pathlib.Path(path)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium of this machine."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get("JEXIT_CHROMIUM") or next(
        filter(None, map(shutil.which, CHROMIUMS)), None
    )
    if path is None:
        pytest.skip(f"no Chromium: none of {', '.join(CHROMIUMS)} is on the path")
    with playwright.sync_playwright() as started:
        # No sandbox: tests may run as root in a container, and open only pages of their own.
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
