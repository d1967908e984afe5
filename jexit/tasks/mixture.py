"""How often prompts of `steps="mixed"` leave a step's size free, prescribe it, or want no steps."""

from __future__ import annotations

from collections.abc import Mapping

from jexit.errors import UserError

DEFAULT_MIXTURE: Mapping[str, float] = {"free": 0.45, "prescribed": 0.40, "at_once": 0.15}


def check_mixture(task: str, mixture: Mapping[str, float]) -> None:
    """Raises UserError unless the weights are of known modes, none negative, one positive."""
    if set(mixture) - set(DEFAULT_MIXTURE) or min(mixture.values(), default=0) < 0:
        raise UserError(
            f"{task}: mixture gives weights >= 0 to {', '.join(DEFAULT_MIXTURE)}, "
            f"got {dict(mixture)}; give other weights"
        )
    if sum(mixture.values()) <= 0:
        raise UserError(
            f"{task}: mixture needs a positive weight, got {dict(mixture)}; give other weights"
        )
