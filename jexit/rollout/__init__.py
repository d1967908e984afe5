"""Generation: prefill, decoding with early exits, sampling."""

from jexit.rollout.engine import Generation, Rollouts, Sequences, SplitModel, generate, rollout

__all__ = ["Generation", "Rollouts", "Sequences", "SplitModel", "generate", "rollout"]
