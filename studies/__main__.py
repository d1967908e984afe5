"""Tables and figures of studies, from the numbers that are kept beside them.

    python -m studies docs/results

The directory holds what `python -m studies.collect` takes from sweeps: for each study NAME.csv,
NAME-curves.csv and NAME-completions.json. The Markdown files beside and above it get each study's
table between the lines

    <!-- NAME: label; label; … -->
    <!-- end -->

where the labels say which columns, and those figures that they link to are drawn: NAME-plane.svg
(accuracy over depth, with the controls), NAME-curves.svg, NAME-measures.svg, NAME-classes.svg
(depth by class of token) and NAME-tokens.svg (completions, each token with its depth). With --all,
every figure that there are numbers for. The same numbers give the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from jexit.errors import UserError
from jexit.io.files import write_bytes_atomic
from studies.figures import FIGURES, drawn
from studies.study import COLUMNS, Study

_BLOCK = re.compile(
    r"(<!-- (?P<name>[\w-]+): (?P<labels>[^>]+?) -->\n)(?:(?!<!--).)*(<!-- end -->)", re.DOTALL
)
_MARKER = re.compile(r"<!-- (?:end|[\w-]+: [^>]+?) -->")
_PICTURE = re.compile(r"!\[[^]]*\]\((?P<path>[^)]+\.svg)\)")


def with_tables(text: str, studies: Mapping[str, Study]) -> str:
    """The Markdown with each study's table between its lines, made anew.

    Raises UserError for a study or a label that there is not, and for a line without the other.
    """

    def block(match: re.Match[str]) -> str:
        name, labels = match["name"], [label.strip() for label in match["labels"].split(";")]
        if name not in studies:
            raise UserError(f"a table of the study {name!r}, which has no {name}.csv; add it")
        if unknown := [label for label in labels if label not in COLUMNS]:
            raise UserError(
                f"the table of {name} has the column {unknown[0]!r}; choose among "
                f"{'; '.join(COLUMNS)}"
            )
        return f"{match[1]}\n{studies[name].table(labels)}\n{match[4]}"

    if alone := _MARKER.search(_BLOCK.sub("", text)):
        raise UserError(
            f"{alone[0]} stands alone; a table is between <!-- NAME: label; label --> and "
            "<!-- end -->"
        )
    return _BLOCK.sub(block, text)


def linked_figures(page: Path, directory: Path) -> set[str]:
    """The names of the directory's .svg files that a page shows."""
    shown = (page.parent / found["path"] for found in _PICTURE.finditer(page.read_text("utf-8")))
    return {path.name for path in shown if path.parent.resolve() == directory}


def _wanted(shown: set[str], studies: Mapping[str, Study]) -> dict[str, list[str]]:
    """The figures to draw of each study; UserError for one that is shown and can't be drawn."""
    known = {f"{name}-{figure}.svg": (name, figure) for name in studies for figure in FIGURES}
    if unknown := sorted(shown - known.keys()):
        raise UserError(
            f"a page shows {unknown[0]}, which is no figure of a study here; a figure is "
            f"NAME-{{{','.join(FIGURES)}}}.svg, beside NAME.csv"
        )
    wanted: dict[str, list[str]] = {name: [] for name in studies}
    for name, figure in (known[file] for file in sorted(shown)):
        wanted[name].append(figure)
    return wanted


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, writes, and turns a user's mistake into one sentence and an exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m studies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, help="directory of the studies' .csv files")
    parser.add_argument("--all", action="store_true", help="draw what no page links to, too")
    arguments = parser.parse_args(argv)
    directory = arguments.directory.resolve()
    try:
        paths = [p for p in sorted(directory.glob("*.csv")) if not p.stem.endswith("-curves")]
        if not paths:
            raise UserError(
                f"{directory} has no .csv file; python -m studies.collect takes one from a sweep"
            )
        studies = {path.stem: Study(path) for path in paths}
        pages = [*directory.parent.glob("*.md"), *directory.parent.parent.glob("*.md")]
        wanted = _wanted({name for p in pages for name in linked_figures(p, directory)}, studies)
        files: dict[Path, str] = {}
        for name, study in studies.items():
            files |= drawn(study, directory, None if arguments.all else wanted[name])
        for page in pages:
            before = page.read_text("utf-8")
            if (after := with_tables(before, studies)) != before:
                files[page] = after
        for path, text in files.items():  # nothing could be refused any more
            write_bytes_atomic(path, text.encode())
            print(f"Wrote {path}")
    except (ValueError, OSError) as error:
        print(f"jexit: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
