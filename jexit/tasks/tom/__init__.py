"""Generated theory-of-mind stories, about who knows what and where people think that things are.

The module `task` contains the task. Its problems are stories with questions (`stories`), balanced
so that rules that need no understanding (`rules`) rarely find the answers. In a story, `events`
happen in a `world` of people with beliefs. `text` and `chain` put a story and its chain of thought
into words. `presence` makes stories whose answers depend only on who was in which room when.
"""
