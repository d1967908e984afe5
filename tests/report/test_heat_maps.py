"""Token-by-token depth maps: text, colour, hazards, and texts that would break a page."""

import dataclasses

import pytest

from jexit.report import heat_maps
from jexit.report.colours import depth_class
from jexit.report.heat_maps import detail, visible
from jexit.report.runs import read_run
from jexit.results import Completion, checked
from parsed_page import parse
from report_files import DEPTHS, EXITS, LAYERS, NASTY, TOKENS, completions, write_evaluated


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read_run(write_evaluated(tmp_path_factory.mktemp("runs") / "eval"))


def shown(run, *made, samples=()):
    """The maps of a run with other completions."""
    return parse(heat_maps.heat_maps(
        dataclasses.replace(run, completions=tuple(made), samples=tuple(samples))))  # fmt: skip


def completion(tokens, depths=None, **values):
    given = {"prompt": "p", "completion": "", "depths": depths or (8,) * len(tokens)}
    return Completion(**(given | values), tokens=tuple(tokens))


def grid_cells(page):
    return [e for e in page if e.attributes.get("role") == "gridcell"]


def test_every_token_is_a_cell_with_its_depth_as_text_and_colour(run):
    records = checked(tuple[Completion, ...], completions(), "completions")
    (record,) = [r for r in records if r.policy == "sample" and r.prompt == NASTY]
    page = shown(run, record)
    cells = grid_cells(page)
    assert len(cells) == len(record.tokens) == 3 * len(TOKENS)
    reached = zip(record.depths, record.hazards, strict=True)
    told = [detail(depth, LAYERS, hazards, EXITS) for depth, hazards in reached]
    assert [cell.attributes["title"] for cell in cells] == told
    for cell, token, depth in zip(cells, record.tokens, record.depths, strict=True):
        assert depth_class(depth, LAYERS) in cell.classes
        assert cell.text == f"{visible(token)}{depth}".replace("\x00", "\\x00")
        assert cell.one("sub").text == str(depth)
    # One cell of a map is a stop of the Tab key.
    assert [cell.attributes["tabindex"] for cell in cells] == ["0"] + ["-1"] * (len(cells) - 1)
    told = detail(2, LAYERS, [0.125, 0.5, None, None, None], EXITS)
    assert told == "depth 2 of 8\nhazard at exit 1: 0.125\nhazard at exit 2: 0.500"
    assert detail(8, LAYERS, [None] * 5, EXITS) == "depth 8 of 8\nno exit was reached"
    # Without the layers of the exits their places have to do.
    assert detail(2, LAYERS, [0.25], []) == "depth 2 of 8\nhazard at exit #0: 0.250"
    keys = page.one("div", class_="depths").all("li")
    assert [key.text for key in keys] == [str(depth) for depth in DEPTHS]
    assert [key.classes for key in keys] == [{depth_class(d, LAYERS)} for d in DEPTHS]


def test_lines_end_where_the_text_ends_them_and_what_cannot_be_seen_is_shown(run):
    tokens = ("a", "\n", "\n", "\n\n", "b", "c.\n")
    row = shown(run, completion(tokens)).one("div", role="row")
    names = ["|" if part.name == "br" else part.text[:-1] for part in row.children]
    assert "".join(names) == "a↵↵↵↵|bc.↵"
    seen = {"": "∅", " ": "␣", "  ": "␣␣", " a": " a", "\n\n": "↵↵", "\t": "⇥", "a\r\n": "a\r↵"}
    assert {token: visible(token) for token in seen} == seen


def test_completions_of_a_prompt_stand_together_and_the_first_prompts_are_open(run, monkeypatch):
    page = parse(heat_maps.heat_maps(run))
    groups = page.all("details")
    assert ["open" in group.attributes for group in groups] == [True, False, False]
    for group in groups:
        titles = [heading.one("strong").text for heading in group.all("h4")]
        assert titles == ["full", "sample", "threshold:0.5"]
    replaced = {"\x00": "\\x00", "\x1b": "\\x1b", "\ud83d": "\ufffd", "\ufffe": "\ufffd"}
    assert groups[0].one("pre").text == NASTY.translate(str.maketrans(replaced))
    short = [completion(("a",) * 30, prompt=str(n)) for n in range(6)]
    groups = shown(run, *short).all("details")
    assert ["open" in group.attributes for group in groups] == [True] * 4 + [False] * 2
    monkeypatch.setattr(heat_maps, "MAX_CELLS", 50)  # the first prompt alone has more
    page = parse(heat_maps.heat_maps(run))
    assert len(page.all("details")) == 1
    assert page.all("p")[-1].text == "2 more prompts are left out to keep the page light."


def test_what_is_known_of_a_completion_is_told(run):
    known = {"verdict": "strict", "step": 7, "reward": 0.5}
    page = shown(run, samples=[completion("ab", (8, 1), **known)])
    assert page.one("h4").text == (
        "step 7 · correct · 2 tokens, mean depth 4.50 of 8 · verifier's reward 0.50"
    )
    page = shown(run, completion((), verdict="none", prompt=""))
    assert page.one("h4").text == "sample · no answer · no tokens"
    assert heat_maps.heat_maps(dataclasses.replace(run, completions=())) is None
