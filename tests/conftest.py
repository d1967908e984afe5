"""Settings that hold for every test: eight CPU devices, where the real checkpoint lies."""

import os
import pathlib
import shutil
import signal
from collections.abc import Iterator

import hypothesis
import jax
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before JAX first looks for devices, and in this process only: commands that tests start see one.
jax.config.update("jax_num_cpu_devices", 8)
# Optimising what tests compile for a CPU takes longer than running it, here and in the commands
# that tests start; the variables have their say. Fusions by XLA's older emitters, in one piece,
# compile in half the time.
if os.environ["JAX_PLATFORMS"] == "cpu" and "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["XLA_FLAGS"] = " ".join(
        [
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_cpu_parallel_codegen_split_count=1",
            os.environ.get("XLA_FLAGS", ""),
        ]
    )
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
