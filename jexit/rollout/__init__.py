"""Generation of completions: prefill, decoding with early exits, and sampling."""

from jexit.config import EngineSize
from jexit.rollout.arrivals import Arrivals, Grown
from jexit.rollout.engine import Decoding, SplitModel, rollout
from jexit.rollout.requests import Request
from jexit.rollout.results import Efficiency, Rollouts
from jexit.rollout.texts import Generation, Piece, generate, stream

__all__ = [
    "Arrivals",
    "Decoding",
    "Efficiency",
    "EngineSize",
    "Generation",
    "Grown",
    "Piece",
    "Request",
    "Rollouts",
    "SplitModel",
    "generate",
    "rollout",
    "stream",
]
