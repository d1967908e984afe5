"""Draws completions as rows of cells, one per token, coloured by the layers run for the token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from jexit.report.colours import depth_class
from jexit.report.rendering import number, render
from jexit.report.runs import ReportedRun
from jexit.results import Completion

# A cell takes about 150 bytes: this many keep the page within a few megabytes.
MAX_CELLS = 40_000
# Prompts are unfolded until this number of cells is visible.
OPEN_CELLS = 100
VERDICTS = {
    "strict": "correct",
    "lenient": "correct, but not in the requested form",
    "wrong": "wrong",
    "none": "no answer",
}


def heat_maps(run: ReportedRun) -> Markup | None:
    """Renders a run's completions as heat maps, grouped by prompt.

    The first prompts are unfolded. Prompts that would make the page too large for a browser are
    left out, and the page states their number. Returns None if the run has no completions.
    """
    completions, steps = _completions(run)
    if not completions or run.layers is None:
        return None
    depths = {depth for completion in completions for depth in completion.depths}
    layers = max(run.layers, max(depths, default=0))
    groups: dict[tuple[str, str], list[Completion]] = {}
    for completion in completions:
        groups.setdefault((completion.prompt, completion.answer), []).append(completion)
    shown, cells = [], 0
    for (prompt, answer), members in groups.items():
        opened = cells < OPEN_CELLS
        cells += sum(len(member.tokens) for member in members)
        if shown and cells > MAX_CELLS:
            break
        shown.append((prompt, answer, members, opened))
    exits = [e for e in run.exits if e < layers]
    return render(
        "heat_maps.html",
        steps=steps,
        depths=[(d, depth_class(d, layers)) for d in sorted({*depths, *exits, layers})],
        layers=layers,
        groups=shown,
        left_out=len(groups) - len(shown),
        facts=lambda completion: facts(completion, layers),
        cells=lambda completion: heat_map(completion, layers, run.exits),
    )


def _completions(run: ReportedRun) -> tuple[Sequence[Completion], list[int]]:
    """Returns the completions for a run's heat maps, and the training steps that they come from.

    An evaluation has no steps. A training run shows the completions of its last and its first step.
    """
    if run.completions or not run.samples:
        return run.completions, []
    steps = sorted({sample.step for sample in run.samples if sample.step is not None})
    steps = list(dict.fromkeys((*steps[-1:], *steps[:1])))
    found = [sample for sample in run.samples if sample.step in steps]
    return sorted(found, key=lambda sample: sample.step != steps[0]), steps


def heat_map(
    completion: Completion, layers: int, exits: Sequence[int]
) -> Iterator[tuple[str, int, str, str, bool]]:
    """Yields (text, depth, CSS class, tooltip, whether a line ends after it) for each token."""
    for place, (token, depth) in enumerate(zip(completion.tokens, completion.depths, strict=True)):
        hazards = None if completion.hazards is None else completion.hazards[place]
        following = completion.tokens[place + 1] if place + 1 < len(completion.tokens) else ""
        ends = "\n" in token and bool(following.strip("\n"))  # blank lines stand side by side
        told = detail(depth, layers, hazards, exits)
        yield visible(token), depth, depth_class(depth, layers), told, ends


def detail(
    depth: int, layers: int, hazards: Sequence[float | None] | None, exits: Sequence[int]
) -> str:
    """Returns a token's tooltip: its depth, and the hazard at every exit that the token reached."""
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
            lines.append("no exit was reached")
    return "\n".join(lines)


def visible(token: str) -> str:
    """Returns a token's text with symbols for line breaks, tabs, lone spaces and empty text."""
    if token and not token.strip(" "):
        return "␣" * len(token)
    if not token:
        return "∅"
    return token.replace("\n", "↵").replace("\t", "⇥")


def facts(completion: Completion, layers: int) -> list[str]:
    """Returns short facts to show above a heat map: policy or step, verdict, depth and reward."""
    told = [completion.policy if completion.step is None else f"step {completion.step}"]
    if completion.verdict:
        told.append(VERDICTS.get(completion.verdict, completion.verdict))
    if completion.depths:
        mean = sum(completion.depths) / len(completion.depths)
        told.append(f"{len(completion.depths)} tokens, mean depth {number(mean)} of {layers}")
    else:
        told.append("no tokens")
    if completion.reward is not None:
        told.append(f"verifier's reward {number(completion.reward)}")
    return told
