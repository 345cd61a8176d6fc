"""Colours that everybody can tell apart, and labels that do not touch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from photon.dashboard import palette
from photon.dashboard.canvas import spread

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
OBSERVERS = {
    "normal": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
         [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
         [-0.011820, 0.042940, 0.968881]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
         [0.004733, 0.691367, 0.303900]]
    ),
}  # fmt: skip


def linear(colour):
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    cone = np.array(
        [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
         [0.0883024619, 0.2817188376, 0.6299787005]]
    )  # fmt: skip
    lab = np.array(
        [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
         [0.0259040371, 0.7827717662, -0.8086757660]]
    )  # fmt: skip
    return lab @ np.cbrt(cone @ np.clip(rgb, 0, 1))


def contrast(one, other):
    bright = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (bright[1] + 0.05) / (bright[0] + 0.05)


SCHEMES = [
    (palette.SILOS_LIGHT, palette.CARD_LIGHT),
    (palette.SILOS_DARK, palette.CARD_DARK),
]


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize(("silos", "card"), SCHEMES)
def test_silos_are_told_apart_by_every_eye(silos, card, observer):
    seen = [oklab(OBSERVERS[observer] @ linear(colour)) for colour in silos]
    apart = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(apart) > 0.14
    assert all(contrast(colour, card) >= 3.0 for colour in silos)


def test_a_silo_keeps_its_hue_from_light_to_dark():
    def hue(colour):
        _, a, b = oklab(linear(colour))
        return np.degrees(np.arctan2(b, a))

    pairs = zip(palette.SILOS_LIGHT, palette.SILOS_DARK, strict=True)
    turned = [(hue(light) - hue(dark) + 180) % 360 - 180 for light, dark in pairs]
    assert np.abs(turned).max() < 3
    hues = np.sort([hue(colour) % 360 for colour in palette.SILOS_LIGHT])
    assert np.diff(np.append(hues, hues[0] + 360)).min() > 35


def test_text_is_readable_in_both_schemes():
    assert contrast(palette.INK, palette.CARD_LIGHT) > 12
    assert contrast(palette.INK_DARK, palette.CARD_DARK) > 12
    assert contrast(palette.MUTED, "#f5f6f8") > 4.5
    assert contrast(palette.MUTED_DARK, "#121418") > 4.5


def test_the_light_values_are_distinct_so_that_they_can_be_swapped():
    for dark in (False, True):
        colours = list(palette.variables(dark).values())
        assert len(colours) == len(set(colours))
    assert list(palette.variables(False)) == list(palette.variables(True))
    assert not set(palette.HEAT) & set(palette.variables(False).values())


def test_twelve_silos_differ_in_colour_or_dash():
    assert len({palette.silo_style(i) for i in range(palette.MOST_NAMED)}) == palette.MOST_NAMED


def test_labels_keep_their_distance_and_stay_close():
    assert spread([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert spread([0.0, 0.0], 0.1) == pytest.approx([0.0, 0.1])
    assert spread([1.0, 1.0], 0.1) == pytest.approx([0.9, 1.0])
    assert spread([], 0.1) == []


def test_the_live_view_costs_no_matplotlib_and_nothing_here_costs_torch():
    code = (
        "import sys, photon.dashboard, photon.telemetry.tensorboard;"
        "slow = {'matplotlib', 'jinja2', 'torch', 'transformers', 'tensorboard', 'numpy'};"
        "assert not slow & set(sys.modules), slow & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
