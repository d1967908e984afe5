"""Measures language models under halting policies, with one file per measurement.

Every measurement takes a `decoder.Decoder`, which completes prompts under a named policy, and
returns records of `jexit.results`. `measures.py` runs the measurements that `eval.measures` lists.
Other files support the measurements: `replay.py` runs recorded completions through the model again,
`completer.py` continues forced prefixes, `transcripts.py` holds answered problems whose text is
then changed, and `scores.py` and `intervals.py` compute the statistics.
"""
