"""Generated theory-of-mind stories.

`task` contains the task. Its problems are `stories` with questions, which are balanced against
`rules` that need no understanding. In a story, `events` happen in a `world` of people with beliefs.
`text` and `chain` put a story and its chain of thought into words. `presence` makes stories whose
answers depend only on who was there when.
"""
