"""Generated theory-of-mind stories, about who knows what and where people think that things are.

The module `task` contains the task. `stories` draws the stories and questions, so that the simple
heuristics in `rules` rarely find the answers. `presence` draws stories whose answers depend only on
who was in which room when. `events` draws the events of a story, and `world` keeps track of places
and of people's beliefs. `text` and `chain` write a story and its chain of thought.
"""
