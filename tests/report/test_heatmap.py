"""Heat maps: every token's depth and hazards, in text and in colour."""

from jexit.report import heatmap
from jexit.report.heatmap import detail, heat_map, heat_maps, legend, visible
from jexit.report.palette import depth_class
from jexit.results import Completion, checked
from parsed_page import parse
from report_files import EXITS, LAYERS, NASTY, TOKENS, completions


def records(**settings):
    return checked(tuple[Completion, ...], completions(**settings), "completions.json")


def grid_cells(page):
    return [e for e in parse(page) if e.attributes.get("role") == "gridcell"]


def test_every_token_is_a_cell_with_its_depth_as_text_and_colour():
    (record,) = [r for r in records() if r.policy == "sample" and r.prompt == NASTY]
    cells = grid_cells(heat_map(record, LAYERS, EXITS, "Tokens"))
    assert len(cells) == len(record.tokens) == 3 * len(TOKENS)
    for cell, token, depth in zip(cells, record.tokens, record.depths, strict=True):
        assert cell.one("sub").text == str(depth)
        assert depth_class(depth, LAYERS) in cell.classes
        shown = visible(token).replace("\x00", "\\x00")
        assert cell.text == f"{shown}{depth}"
        assert cell.attributes["title"].splitlines()[0] == f"depth {depth} of {LAYERS}"


def test_one_cell_of_a_map_is_a_stop_of_the_tab_key():
    cells = grid_cells(heat_map(records()[0], LAYERS, EXITS, "Tokens"))
    assert [cell.attributes["tabindex"] for cell in cells] == ["0"] + ["-1"] * (len(cells) - 1)


def test_hazards_are_told_for_the_exits_that_were_reached():
    told = detail(2, LAYERS, [0.125, 0.5, None, None, None], EXITS)
    assert told == "depth 2 of 8\nhazard at exit 1: 0.125\nhazard at exit 2: 0.500"
    assert detail(8, LAYERS, [None] * 5, EXITS) == "depth 8 of 8\nno exit was asked"
    assert detail(8, LAYERS, None, EXITS) == "depth 8 of 8"
    # Without the layers of the exits their places have to do.
    assert detail(2, LAYERS, [0.25], []) == "depth 2 of 8\nhazard at exit #0: 0.250"


def test_blank_lines_stand_side_by_side():
    tokens = ("a", "\n", "\n", "\n\n", "b", "c.\n")
    record = Completion(prompt="p", completion="", tokens=tokens, depths=(8,) * 6)
    row = parse(heat_map(record, LAYERS, EXITS, "Tokens")).one("div", role="row")
    names = ["|" if part.name == "br" else part.text[:-1] for part in row.children]
    assert "".join(names) == "a↵↵↵↵|bc.↵"


def test_what_cannot_be_seen_is_shown():
    assert [visible(t) for t in ("", " ", "  ", " a", "\n\n", "\t", "a\r\n")] == [
        "∅", "␣", "␣␣", " a", "↵↵", "⇥", "a\r↵",
    ]  # fmt: skip


def test_completions_of_a_prompt_stand_together_and_the_first_prompt_is_open():
    page = parse(heat_maps(records(), LAYERS, EXITS))
    groups = page.all("details")
    assert len(groups) == 3
    assert ["open" in group.attributes for group in groups] == [True, False, False]
    for group in groups:
        titles = [heading.one("strong").text for heading in group.all("h4")]
        assert titles == ["full", "sample", "threshold:0.5"]
    shown = groups[0].one("pre").text
    replaced = {"\x00": "\\x00", "\x1b": "\\x1b", "\ud83d": "\ufffd", "\ufffe": "\ufffd"}
    assert shown == NASTY.translate(str.maketrans(replaced))


def test_prompts_with_few_tokens_are_open_together():
    short = [
        Completion(prompt=str(n), completion="ab", tokens=("a",) * 30, depths=(8,) * 30)
        for n in range(6)
    ]
    groups = parse(heat_maps(short, LAYERS, EXITS)).all("details")
    assert ["open" in group.attributes for group in groups] == [True] * 4 + [False] * 2


def test_verdict_mean_depth_and_reward_are_told():
    record = Completion(
        prompt="p", completion="ab", tokens=("a", "b"), depths=(8, 1), verdict="strict",
        step=7, reward=0.5,
    )  # fmt: skip
    heading = parse(heat_maps([record], LAYERS, EXITS)).one("h4")
    assert heading.text == "step 7 · right · 2 tokens, mean depth 4.50 of 8 · reward 0.50"


def test_an_empty_completion_is_no_fault():
    record = Completion(prompt="", completion="", tokens=(), depths=(), verdict="none")
    page = parse(heat_maps([record], LAYERS, EXITS))
    assert page.one("h4").text == "sample · no answer · no tokens"


def test_a_page_that_would_be_too_large_leaves_prompts_out_and_says_so(monkeypatch):
    monkeypatch.setattr(heatmap, "MAX_CELLS", 50)  # the first prompt alone has more
    page = parse(heat_maps(records(), LAYERS, EXITS))
    assert len(page.all("details")) == 1
    assert page.all("p")[-1].text == "2 more prompts are left out to keep the page light."


def test_the_legend_has_each_depth_once_in_order():
    page = parse(legend([4, 8, 1, 4], LAYERS))
    keys = page.all("li")
    assert [key.text for key in keys] == ["1", "4", "8"]
    assert [key.classes for key in keys] == [{depth_class(d, LAYERS)} for d in (1, 4, 8)]
