"""What tests of charts look for among their shapes."""

import re

from jexit.report.charts import Text


def classed(chart, *wanted):
    return [shape for shape in chart.shapes if set(wanted) <= set(shape.classes.split())]


def words(chart, class_="tick"):
    return [shape.text for shape in classed(chart, class_) if isinstance(shape, Text)]


def corners(shape):
    return [tuple(map(float, pair.split())) for pair in re.split("[ML]", shape.d.rstrip("Z"))[1:]]


def middle(shape):
    """The middle of a marker, in the chart's own units."""
    if "a" in shape.d:  # a circle begins at its left
        left, y, radius = map(float, re.match(r"M([\d.-]+) ([\d.-]+)a([\d.]+)", shape.d).groups())
        return left + radius, y
    xs, ys = zip(*corners(shape), strict=True)
    return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
