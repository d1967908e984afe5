"""Generated theory-of-mind stories, about who knows what and where people think that things are.

`task` contains the task. The module `stories` draws the problems, each a story with a question, so
that rules that need no understanding rarely find the answers. In a story, `events` happen in a
`world` of people with beliefs. `text` and `chain` put a story and its chain of thought into words.
`presence` makes stories whose answers depend only on who was in which room at what time. `rules`
contains rules against which the stories are balanced.
"""
