"""Generated theory-of-mind stories, about who knows what and where people think that things are.

The module `task` contains the task. Its problems are stories with questions, which `stories` draws
so that simple heuristics (`rules`) rarely find the answers. In a story, `events` happen in a
`world` of people with beliefs. `text` and `chain` write a story and its chain of thought.
`presence` draws stories whose answers depend only on who was in which room when.
"""
