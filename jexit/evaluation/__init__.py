"""Measures a model under halting policies. Each file is named after what it measures.

Every measurement starts from `decoder.Decoder`, a model that completes prompts under a named
policy, and ends in the records of `jexit.results`:

| file | measures |
|---|---|
| `accuracy.py` | accuracy, depth, tokens and layers of a policy's attempts at the problems |
| `depth.py` | mean depth per class of token |
| `controls.py` | controls with a policy's mean depth that do not choose which tokens stop early |
| `compare.py` | two evaluations, problem by problem |
| `confidence.py` | a baseline for exit heads: exits that leave where they are confident |
| `exits.py` | how close each exit is to the last layer, and how leaving early changes predictions |
| `hazards.py` | calibration of the exits' hazards |
| `planning.py` | what residuals know of tokens that are to come |
| `serial_depth.py` | the longest computation that is not written down |
| `capacity.py` | how much the model can compute in one step of a prescribed size |
| `faithfulness.py` | whether the answer comes from the chain of thought, by interventions |
| `measures.py` | the measures that `eval.measures` names |
| `loglikelihood.py` | log-likelihoods of given continuations under a policy |
| `harness.py`, `harness_model.py` | the tasks of lm-evaluation-harness |

The other files support these measurements. `replay.py` runs decoded completions through the model
again, `completer.py` continues forced prefixes, `transcripts.py` contains the answered problems on
which interventions are made, `scores.py` and `intervals.py` compute the statistics, and `tables.py`
prints the results.
"""
