"""Completes the configured prompts and prints the completions."""

from __future__ import annotations

from jexit.config import Config
from jexit.errors import UserError
from jexit.loops.setup import load_model, sample_policy, with_trained_exits
from jexit.model.policies import policy_of
from jexit.rollout import generate


def print_generations(config: Config) -> None:
    """Completes the prompts in `generate.prompts`; prints the texts, and each token's depth."""
    config = with_trained_exits(config)
    model, tokenizer = load_model(config, trains=False)
    g = config.generate
    if not g.prompts:
        raise UserError(
            "config.generate.prompts is empty, but it must contain at least one prompt; set "
            "config.generate.prompts='(\"...\",)'"
        )
    layers = model.arch.layers
    generation = generate(
        model,
        tokenizer,
        g.prompts,
        policy=policy_of(g.policy, sample_policy(config), "speculate"),
        max_new_tokens=g.max_new_tokens,
        temperature=g.temperature,
        top_p=g.top_p,
        top_k=g.top_k,
        min_p=g.min_p,
        stop=g.stop,
        seed=config.seed,
        size=config.engine,
    )
    for prompt, text, depths in zip(g.prompts, generation.texts, generation.depths, strict=True):
        mean = sum(depths) / len(depths)
        print(f"> {prompt}\n{text}")
        print(f"  [{len(depths)} tokens, mean depth {mean:.2f} of {layers} layers]")
        print("  depths: " + " ".join(map(str, depths)) + "\n")
