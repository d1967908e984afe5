"""Pure jitted training steps, (state, batch, key) → (state, metrics), without any disk access."""
