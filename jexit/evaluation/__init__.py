"""Measures language models under halting policies, with one file per measurement.

A `decoder.Decoder` completes prompts under a named policy. The measurements return records of
`jexit.results`, and `measures.py` runs those that `eval.measures` lists. Other files support the
measurements: `replay.py` runs recorded completions through the model again, `completer.py`
continues forced prefixes, `transcripts.py` contains answered problems whose text is then changed,
and `scores.py` and `intervals.py` compute the statistics.
"""
