"""Colours: their order can be read off their lightness, and text can be read on them."""

import re

import numpy as np
import pytest

from jexit.report.colours import (
    LEVELS,
    SCHEMES,
    STEPS,
    depth_class,
    depth_colours,
    level_colours,
    luminance,
    named_colours,
)

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


def lab(colour, seen_as="none"):
    """CIE L*a*b* (D65) of a colour."""
    rgb = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(DICHROMATS[seen_as] @ linear, 0, 1)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = to_xyz @ linear / np.array([0.9505, 1.0, 1.089])
    fx, fy, fz = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


def contrast(first, second):
    """WCAG's contrast ratio of two colours, 1 to 21."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_text_stands_out_and_deeper_is_darker_for_every_eye():
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)  # the known threshold
    for scheme in SCHEMES:
        found = named_colours(scheme)
        for ground in ("page", "panel"):
            for words in ("text", "quiet", "link"):
                assert contrast(found[words], found[ground]) >= 4.5, (words, ground)
        for series in (name for name in found if re.fullmatch(r"s\d", name)):
            assert contrast(found[series], found["page"]) >= 4.5, series  # labels have them
        depths, levels = depth_colours(scheme), level_colours(scheme)
        assert len(depths) == STEPS + 1 and min(contrast(*pair) for pair in depths) >= 4.5
        assert contrast(depths[-1][0], found["page"]) >= 3  # all layers: what costs most
        assert len(levels) == LEVELS + 1
        assert min(contrast(level, found["page"]) for level in levels) >= 1.3
        order = np.diff([lab(level)[0] for level in levels])
        assert (order > 0).all() or (order < 0).all()
        for seen_as in DICHROMATS:
            lightness = [lab(background, seen_as)[0] for background, _ in depths]
            assert (np.diff(lightness) < -0.4).all(), seen_as
            first = [lab(found[f"s{index}"], seen_as) for index in range(4)]
            apart = [np.linalg.norm(a - b) for i, a in enumerate(first) for b in first[:i]]
            assert min(apart) >= 15, seen_as


def test_the_class_of_a_depth():
    assert [depth_class(d, 8) for d in (0, 1, 4, 8, 9)] == ["c0", "c4", "c16", "c32", "c32"]
    for layers in (24, 28, 36, 48, 64):  # exits every five layers keep apart
        depths = [*range(5, layers, 5), layers]
        assert len({depth_class(depth, layers) for depth in depths}) == len(depths)
