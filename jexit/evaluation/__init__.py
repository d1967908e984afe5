"""Measures a model under halting policies. Each file is named after what it measures.

Every measurement starts from `decoder.Decoder`, a model that completes prompts under a named
policy, and ends in the records of `jexit.results`. `measures.py` runs those that `eval.measures`
names. Some files only support others: `replay.py` runs decoded completions through the model again,
`completer.py` continues forced prefixes, `transcripts.py` contains the answered problems on which
interventions are made, and `scores.py` and `intervals.py` compute the statistics.
"""
