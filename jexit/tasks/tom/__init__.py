"""Generated theory-of-mind stories.

`task` is the task, made of a `world` in which `events` happen and people believe things, `stories`
about it with questions (balanced against `rules` that need no understanding), their `text` and
their `chain` of thought; `presence` tells who was there when.
"""
