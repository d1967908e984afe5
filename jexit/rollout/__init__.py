"""Generation: prefill, decoding with early exits, sampling."""

from jexit.config import EngineSize
from jexit.rollout.engine import SplitModel, rollout
from jexit.rollout.generate import Generation, Piece, generate, stream
from jexit.rollout.rollouts import Efficiency, Rollouts, Sequences

__all__ = [
    "Efficiency",
    "EngineSize",
    "Generation",
    "Piece",
    "Rollouts",
    "Sequences",
    "SplitModel",
    "generate",
    "rollout",
    "stream",
]
