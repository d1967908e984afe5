"""Compile time and size of the training steps of a deep stack against a shallow one.

    python tests/benchmarks/compile_time.py --deep=36 --shallow=4

Neither should grow with depth, as the stack is scanned. Prints, for the jitted steps of the `sft`
and `rl` configs with a preset's own settings, CPU seconds of XLA (which other work on the machine
does not stretch), the instructions and bytes of the optimised module, and the ratios.
"""

import argparse
import dataclasses
import os
import statistics
import time
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from configs import rl, sft
from jexit.aot.hlo import parse
from jexit.aot.programs import programs
from jexit.config import Config
from jexit.dist import make_mesh
from jexit.presets import PRESETS

STEPS = {"calibration step": sft, "RL update": rl}
EXITS = (1, 2)  # at either depth, so that the layers are all that differs


class Compiled(NamedTuple):
    seconds: float
    instructions: float
    kib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="qwen3-4b")
    parser.add_argument("--deep", type=int, default=36)
    parser.add_argument("--shallow", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{arguments.preset}, median of {arguments.repeats}")
    print(f"{'':<18}{'layers':>8}{'CPU s':>9}{'instructions':>14}{'HLO KiB':>9}")
    for step in STEPS:
        found: dict[int, list[Compiled]] = {arguments.deep: [], arguments.shallow: []}
        for _ in range(arguments.repeats):
            for layers, results in found.items():
                results.append(compile_step(arguments.preset, layers, step))
        medians = [
            Compiled(*map(statistics.median, zip(*results, strict=True)))
            for results in found.values()
        ]
        for layers, (seconds, instructions, kib) in zip(found, medians, strict=True):
            print(f"{step:<18}{layers:>8}{seconds:>9.2f}{instructions:>14.0f}{kib:>9.0f}")
        ratios = [deep / shallow for deep, shallow in zip(*medians, strict=True)]
        print(
            f"{step:<18}{'ratio':>8}{ratios[0]:>9.2f}{ratios[1]:>14.2f}{ratios[2]:>9.2f}",
            flush=True,
        )


def compile_step(preset: str, layers: int, step: str) -> Compiled:
    """Compiles the preset's step with another number of layers, without weights."""
    known = PRESETS[preset]
    name = f"{preset} of {layers} layers"
    architecture = dataclasses.replace(known.architecture, layers=layers)
    PRESETS[name] = dataclasses.replace(known, architecture=architecture)
    settings = STEPS[step].get_config(preset)
    with settings.unlocked():
        settings.preset, settings.exits.layers = name, EXITS
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        found = (p for p in programs(Config.from_dict(settings), mesh) if p.name == step)
        lowered = next(found).lower()
    start = time.process_time()
    compiled = lowered.compile()
    seconds = time.process_time() - start
    text = compiled.as_text()
    instructions = sum(map(len, parse(text).computations.values()))
    return Compiled(seconds, instructions, len(text) / 1024)


if __name__ == "__main__":
    main()
