"""What all jitted steps of a config have in common."""

import re

import pytest

from jexit.aot.programs import architecture, programs
from jexit.config import Config, config_dict
from jexit.dist import make_mesh

PRODUCT = re.compile(r"stablehlo\.dot_general .*")


def head_products(config):
    """The lines of all lowered steps that multiply with the vocabulary, by the step's name."""
    vocabulary = architecture(config).vocab_size
    for program in programs(config, make_mesh()):
        for line in PRODUCT.findall(program.lower().as_text()):
            if re.search(rf"[<x]{vocabulary}x", line):
                yield program.name, line


@pytest.mark.parametrize("command", ["sft", "rl"])
def test_sampler_and_trainer_multiply_with_the_head_at_one_precision(command):
    """Float32 as such: accelerators would otherwise round it, and rounding one alone is a gap."""
    settings = config_dict(command)
    settings.batch_size = 8
    settings.model.dtype = "float32"
    settings.task.max_prompt_tokens = 40  # no length is that of the vocabulary
    for section in (settings.sft, settings.rl, settings.eval):
        section.max_new_tokens = 40
    found = list(head_products(Config.from_dict(settings)))
    assert len({name for name, _ in found}) >= 3, "prefill, decoding, a training step"
    assert [line for _, line in found if "precision = [HIGHEST, HIGHEST]" not in line] == []
