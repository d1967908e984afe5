"""Makes the tables and charts of studies from the numbers that `python -m studies.collect` wrote.

    python -m studies docs/results

The directory contains NAME.csv, NAME-seeds.csv, NAME-curves.csv and NAME-completions.json for each
study NAME. In the Markdown files of the two folders above the directory, a study's table is written
between the lines

    <!-- NAME: label; label; … -->
    <!-- end -->

where the labels name the columns. The charts that these pages link to are drawn: NAME-plane.svg
(accuracy over depth, with the controls), NAME-curves.svg, NAME-measures.svg, NAME-classes.svg
(depth by class of token), NAME-tokens.svg (completions, each token with its depth) and
NAME+OTHER-cost.svg (accuracy over the compute of a problem, for one or more studies). With --all,
every chart of one study for which there are numbers is drawn, too. The same numbers give the same
files, byte for byte.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from jexit.errors import UserError, command
from jexit.io.files import write_bytes_atomic
from studies.charts import CHARTS, JOINT
from studies.study import COLUMNS, Study

_BLOCK = re.compile(
    r"(<!-- (?P<name>[\w-]+): (?P<labels>[^>]+?) -->\n)(?:(?!<!--).)*(<!-- end -->)", re.DOTALL
)
_MARKER = re.compile(r"<!-- (?:end|[\w-]+: [^>]+?) -->")
_PICTURE = re.compile(r"!\[[^]]*\]\((?P<path>[^)]+\.svg)\)")


def with_tables(text: str, studies: Mapping[str, Study]) -> str:
    """Returns the Markdown text with the table between each pair of markers regenerated.

    Raises UserError for an unknown study or column, and for a marker without its counterpart.
    """

    def block(match: re.Match[str]) -> str:
        name, labels = match["name"], [label.strip() for label in match["labels"].split(";")]
        if name not in studies:
            raise UserError(
                f"a page has a table of the study {name!r}, but there is no {name}.csv; add the "
                "file, or remove the table"
            )
        if unknown := [label for label in labels if label not in COLUMNS]:
            raise UserError(
                f"the table of {name} has the column {unknown[0]!r}, which does not exist; use "
                f"columns from {', '.join(map(repr, COLUMNS))}"
            )
        return f"{match[1]}\n{studies[name].table(labels)}\n{match[4]}"

    if alone := _MARKER.search(_BLOCK.sub("", text)):
        raise UserError(
            f"the marker {alone[0]} stands alone, but a table must be between "
            "<!-- NAME: label; label --> and <!-- end -->; add the other marker"
        )
    return _BLOCK.sub(block, text)


def linked_charts(page: Path, directory: Path) -> set[str]:
    """Returns the names of the .svg files in `directory` that a page shows."""
    shown = (page.parent / found["path"] for found in _PICTURE.finditer(page.read_text("utf-8")))
    return {path.name for path in shown if path.parent.resolve() == directory}


def _studies_of(chart: str, studies: Mapping[str, Study]) -> tuple[list[Study], str]:
    """Returns the studies and the kind of a chart that a page shows.

    Raises UserError if there is no such study or kind.
    """
    joint, _, kind = chart.removesuffix(".svg").rpartition("-")
    names = joint.split("+")
    if kind not in CHARTS or not {*names} <= {*studies} or (len(names) > 1 and kind != JOINT):
        raise UserError(
            f"a page shows {chart}, but a chart must be called NAME-CHART.svg, where NAME.csv "
            f"exists and CHART is one of {', '.join(CHARTS)}, or NAME+OTHER-{JOINT}.svg; rename or "
            "remove the chart"
        )
    return [studies[name] for name in names], kind


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m studies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, help="directory of the studies' .csv files")
    parser.add_argument("--all", action="store_true", help="draw what no page links to, too")
    arguments = parser.parse_args(argv)
    directory = arguments.directory.resolve()
    parts = ("-curves", "-seeds")
    paths = [p for p in sorted(directory.glob("*.csv")) if not p.stem.endswith(parts)]
    if not paths:
        raise UserError(
            f"{directory} contains no .csv file, but at least one is needed; make one from a sweep "
            "with python -m studies.collect"
        )
    studies = {path.stem: Study(path) for path in paths}
    pages = [*directory.parent.glob("*.md"), *directory.parent.parent.glob("*.md")]
    files: dict[Path, str] = {}
    linked = {name for page in pages for name in linked_charts(page, directory)}
    pairs = itertools.product(studies, CHARTS) if arguments.all else ()
    for chart in sorted(linked | {f"{name}-{kind}.svg" for name, kind in pairs}):
        shown, kind = _studies_of(chart, studies)
        text = CHARTS[kind](*shown)
        if text:
            files[directory / chart] = text
        elif chart in linked:
            raise UserError(
                f"a page shows {chart}, but its studies have no numbers for this chart; remove it "
                "from the page"
            )
    for page in pages:
        before = page.read_text("utf-8")
        if (after := with_tables(before, studies)) != before:
            files[page] = after
    for path, text in files.items():  # nothing could be refused any more
        write_bytes_atomic(path, text.encode())
        print(f"Wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
