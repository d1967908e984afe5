"""What a model does under halting policies, each file named by what it measures.

Everything starts from `decoder.Decoder`, a model that completes prompts under a named policy, and
ends in the records of `jexit.results`:

| file | measures |
|---|---|
| `accuracy.py` | accuracy, depth, tokens and layers of a policy's attempts at the problems |
| `depth.py` | depth by class of token |
| `controls.py` | the same mean depth without knowing which tokens to stop |
| `exits.py` | how close each exit comes to the last layer, and what leaving early does to a text |
| `hazards.py` | calibration of the exits' hazards |
| `capacity.py` | what is computed in one step of a prescribed size |
| `faithfulness.py` | whether the answer comes from the chain of thought, by interventions |
| `measures.py` | all of these as `eval.measures` names them |
| `loglikelihood.py` | log-likelihoods of given continuations under a policy |
| `harness.py`, `harness_model.py` | the tasks of lm-evaluation-harness |

The others carry them: `replay.py` runs completions through the model again, `completer.py` goes on
from forced prefixes, `transcripts.py` holds what interventions are made on, `scores.py` and
`intervals.py` are the statistics, `tables.py` prints.
"""
