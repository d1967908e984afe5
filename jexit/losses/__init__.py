"""Loss functions that take plain arrays, not a model or a `Config`."""
