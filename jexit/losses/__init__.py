"""Loss functions, which take plain arrays instead of a model or a `Config`."""
