"""Pure, jitted training steps (state, batch, key) → (state, metrics), without disk access."""
