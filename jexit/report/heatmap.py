"""Completions as rows of cells, one a token, coloured by the layers that its pass ran."""

from __future__ import annotations

from collections.abc import Sequence

from jexit.report.markup import Html, join, number, tag
from jexit.report.palette import depth_class
from jexit.results import Completion

# A cell takes about 150 bytes: this many keep the page within a few megabytes.
MAX_CELLS = 40_000
# Prompts are unfolded until so many cells can be seen.
OPEN_CELLS = 100
VERDICTS = {
    "strict": "right",
    "lenient": "right, not in the asked form",
    "wrong": "wrong",
    "none": "no answer",
}


def legend(depths: Sequence[int], layers: int) -> Html:
    """Which colour stands for which depth."""
    keys = [tag("li", str(d), class_=depth_class(d, layers)) for d in sorted(set(depths))]
    return tag(
        "div",
        tag("span", "layers run:"),
        tag("ul", *keys),
        tag("span", f"of {layers}"),
        class_="depths",
    )


def heat_maps(completions: Sequence[Completion], layers: int, exits: Sequence[int]) -> Html:
    """Every completion, those of one prompt together; the first prompts are open.

    What would make the page larger than a browser likes is left out, and said to be.
    """
    groups: dict[tuple[str, str], list[Completion]] = {}
    for completion in completions:
        groups.setdefault((completion.prompt, completion.answer), []).append(completion)
    shown, cells = [], 0
    for (prompt, answer), members in groups.items():
        opened = cells < OPEN_CELLS
        cells += sum(len(member.tokens) for member in members)
        if shown and cells > MAX_CELLS:
            break
        shown.append(_group(prompt, answer, members, layers, exits, opened=opened))
    left_out = len(groups) - len(shown)
    more = None
    if left_out:
        more = tag("p", f"{left_out} more prompts are left out to keep the page light.")
    return join(*shown, more)


def heat_map(completion: Completion, layers: int, exits: Sequence[int], label: str) -> Html:
    """One completion's tokens, each with its depth as text below it.

    The pointer or the keyboard's focus on a cell shows the hazards; without scripts the pointer
    does.
    """
    cells: list[Html] = []
    for place, (token, depth) in enumerate(zip(completion.tokens, completion.depths, strict=True)):
        hazards = None if completion.hazards is None else completion.hazards[place]
        cells.append(
            tag(
                "span",
                visible(token),
                tag("sub", str(depth)),
                role="gridcell",
                class_=depth_class(depth, layers),
                title=detail(depth, layers, hazards, exits),
                tabindex="-1" if place else "0",
            )
        )
        following = completion.tokens[place + 1] if place + 1 < len(completion.tokens) else ""
        if "\n" in token and following.strip("\n"):  # blank lines stand side by side
            cells.append(tag("br"))
    row = tag("div", *cells, role="row")
    return tag("div", row, class_="map", role="grid", aria_label=label)


def detail(
    depth: int, layers: int, hazards: Sequence[float | None] | None, exits: Sequence[int]
) -> str:
    """What is said of one token: its depth, and the hazard at every exit that was reached."""
    lines = [f"depth {depth} of {layers}"]
    if hazards is not None:
        names = [str(layer) for layer in exits]
        names += [f"#{index}" for index in range(len(names), len(hazards))]
        lines += [
            f"hazard at exit {name}: {hazard:.3f}"
            for name, hazard in zip(names, hazards, strict=False)
            if hazard is not None
        ]
        if len(lines) == 1:
            lines.append("no exit was asked")
    return "\n".join(lines)


def visible(token: str) -> str:
    """A token's text with line breaks, tabs and lone spaces made visible."""
    if token and not token.strip(" "):
        return "␣" * len(token)
    if not token:
        return "∅"
    return token.replace("\n", "↵").replace("\t", "⇥")


def _group(
    prompt: str,
    answer: str,
    members: Sequence[Completion],
    layers: int,
    exits: Sequence[int],
    *,
    opened: bool,
) -> Html:
    parts = [tag("pre", prompt, class_="prompt")]
    for member in members:
        facts = [member.policy] if member.step is None else [f"step {member.step}"]
        if member.verdict:
            facts.append(VERDICTS.get(member.verdict, member.verdict))
        if member.depths:
            mean = sum(member.depths) / len(member.depths)
            facts.append(f"{len(member.depths)} tokens, mean depth {number(mean)} of {layers}")
        else:
            facts.append("no tokens")
        if member.reward is not None:
            facts.append(f"reward {number(member.reward)}")
        heading = tag("h4", tag("strong", facts[0]), f" · {' · '.join(facts[1:])}")
        parts += [heading, heat_map(member, layers, exits, f"Tokens under {facts[0]}")]
    line = prompt if len(prompt) <= 90 else f"{prompt[:90]}…"
    told = [tag("span", " ".join(line.split()))]
    if answer:
        told.append(tag("small", f" right answer {answer}"))
    return tag("details", tag("summary", *told), *parts, class_="problem", open=opened)
