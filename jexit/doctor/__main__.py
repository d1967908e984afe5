"""Reports a machine's hardware and software, and checks its results and its speed.

    python -m jexit.doctor

Compares every kernel and attention implementation that jexit may choose on the first device with a
float32 reference: outputs and gradients, in float32 and bfloat16. For each failure, prints the
fault and a setting that avoids it. Then times decoding and training steps of a model with random
weights, without the kernels if any check failed. Exits with code 1 if any check failed. Takes one
to ten minutes.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import os
import platform
import sys
from collections.abc import Sequence

from jexit.doctor import agreement, speed
from jexit.doctor.agreement import PORTABLE, Check
from jexit.errors import say

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jexit.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    print("\n".join(machine()), flush=True)
    print(f"\n{'operation':<18}{'implementation':<16}{'precision':<10}{'error':>9}{'':>4}"
          f"{'ms':>9}{'vs xla':>8}")  # fmt: skip
    found: list[Check] = []
    for check in agreement.checks():
        found.append(check)
        print(_row(check, found), flush=True)
    wrong = [check for check in found if check.failure]
    print()
    for check in wrong:
        say(
            f"the {check.implementation} implementation of {check.operation} fails in "
            f"{check.dtype}: {check.failure}; {check.remedy}"
        )
    if not wrong:
        print("Every implementation agrees with its definition.")
    name, arch = speed.fitting()
    print(f"\n{name}: {arch.layers} layers of width {arch.width}, with random weights")
    print(f"{'work':<28}{'kernels':<10}{'tokens/s':>12}{'ms/step':>10}{'MFU':>8}", flush=True)
    for timing in speed.timings(arch, kernels=not wrong):  # a failing kernel would end the timings
        share = "" if timing.mfu is None else f"{timing.mfu:.1%}"
        print(
            f"{timing.work:<28}{timing.implementation:<10}{timing.tokens_per_second:>12,.0f}"
            f"{1e3 * timing.seconds:>10,.1f}{share:>8}",
            flush=True,
        )
    return 1 if wrong else 0


def machine() -> list[str]:
    import jax

    import jexit
    from jexit.kernels.chips import UNKNOWN, chip

    devices = jax.local_devices()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    known = chip()
    peak = ""
    if devices[0].platform != "cpu":
        peak = ", a chip that is not in jexit's table"
        if known is not UNKNOWN:
            flops = known.peak_flops
            peak = f", {known.memory_gib:g} GiB" + (f", {flops / 1e12:g} TFLOP/s" if flops else "")
    return [
        f"jexit {jexit.__version__}, Python {platform.python_version()}",
        ", ".join(_versions()),
        f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform}){peak}",
        f"host: {os.cpu_count()} cores, {memory:.0f} GiB",
    ]


def _versions() -> list[str]:
    found = {
        package.name: package.version
        for package in metadata.distributions()
        if package.name in PACKAGES or package.name.startswith(("jax-cuda", "jax-rocm"))
    }
    return [f"{name} {found[name]}" for name in sorted(found)]


def _row(check: Check, found: Sequence[Check]) -> str:
    same = (check.operation, check.dtype, PORTABLE)
    portable = next(
        (c.seconds for c in found if (c.operation, c.dtype, c.implementation) == same), None
    )
    ratio = f"{check.seconds / portable:.2f}" if check.seconds and portable else ""
    error = "" if check.error is None else f"{check.error:.1e}"
    milliseconds = "" if check.seconds is None else f"{1e3 * check.seconds:.2f}"
    return (
        f"{check.operation:<18}{check.implementation:<16}{check.dtype:<10}{error:>9}"
        f"{' !' if check.failure else '':<4}{milliseconds:>9}{ratio:>8}"
    )


if __name__ == "__main__":
    sys.exit(main())
