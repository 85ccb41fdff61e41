"""Colors that are told apart."""

from __future__ import annotations

import colorsys


def apart(count: int) -> list[list[int]]:
    """A color `[r, g, b]` for each of `count` classes; the first ones do not depend on `count`."""
    colors = []
    for number in range(count):
        hue = number * 0.618034 % 1  # the golden ratio: any first n are spread
        value = (0.95, 0.75)[number // 12 % 2]
        colors.append([round(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.8, value)])
    return colors
