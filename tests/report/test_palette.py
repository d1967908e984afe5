"""Depth's colours: order can be read off their lightness, and text can be read on them."""

import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

import jexit.report
from jexit.report.palette import STEPS, contrast, depth_class, depth_colours, luminance

CSS = (Path(jexit.report.__file__).parent / "page.css").read_text()
LIGHT, DARK = re.findall(r":root \{(.*?)\}", CSS, re.S)[:2]

# Linear RGB as the two common kinds of dichromats see it (Machado, Oliveira, Fernandes 2009).
DICHROMATS = {
    "none": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
         [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
         [-0.011820, 0.042940, 0.968881]]
    ),
}  # fmt: skip


def colours(block):
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))


def lab(colour, seen_as="none"):
    """CIE L*a*b* (D65) of a colour."""
    rgb = np.array(mpl.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(DICHROMATS[seen_as] @ linear, 0, 1)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = to_xyz @ linear / np.array([0.9505, 1.0, 1.089])
    fx, fy, fz = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


def test_luminance_against_known_contrasts():
    assert luminance("#ffffff") == pytest.approx(1.0) and luminance("#000000") == 0.0
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)  # the known threshold


@pytest.mark.parametrize("seen_as", DICHROMATS)
def test_deeper_is_darker_at_every_step_for_every_eye(seen_as):
    lightness = [lab(background, seen_as)[0] for background, _ in depth_colours()]
    assert len(lightness) == STEPS + 1
    assert (np.diff(lightness) < -0.5).all()


def test_text_on_every_depth_can_be_read():
    assert min(contrast(*pair) for pair in depth_colours()) >= 4.5


def test_the_class_of_a_depth():
    assert [depth_class(d, 8) for d in (0, 1, 4, 8, 9)] == ["c0", "c4", "c16", "c32", "c32"]
    # Exits every five layers of every preset's depth keep apart.
    for layers in (24, 28, 36, 48, 64):
        depths = [*range(5, layers, 5), layers]
        assert len({depth_class(depth, layers) for depth in depths}) == len(depths)


@pytest.mark.parametrize("block", [LIGHT, DARK], ids=["light", "dark"])
def test_words_and_lines_stand_out_from_the_page(block):
    found = colours(block)
    assert len([name for name in found if re.fullmatch(r"s\d", name)]) == 8
    for ground in ("page", "panel"):
        for words in ("text", "quiet", "link"):
            assert contrast(found[words], found[ground]) >= 4.5, (words, ground)
    for series in (name for name in found if re.fullmatch(r"s\d", name)):
        assert contrast(found[series], found["page"]) >= 4.5, series  # labels have these colours


@pytest.mark.parametrize("seen_as", DICHROMATS)
@pytest.mark.parametrize("block", [LIGHT, DARK], ids=["light", "dark"])
def test_the_first_series_keep_apart_for_every_eye(block, seen_as):
    found = colours(block)
    first = [lab(found[f"s{index}"], seen_as) for index in range(4)]
    apart = [np.linalg.norm(a - b) for i, a in enumerate(first) for b in first[:i]]
    assert min(apart) >= 15
