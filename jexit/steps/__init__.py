"""Pure jitted steps: (state, batch, key) → (state, metrics); nothing here touches a disk."""
