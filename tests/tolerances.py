"""How far apart two computations of the same thing may be, in one place.

`LOGITS` and `LOGPROBS` are absolute differences in float32 with logits of order 1 to 30.
"""

import numpy as np

LOGITS = 1e-4  # against Hugging Face, models of up to 8 layers
LOGITS_REAL = 5e-3  # against Hugging Face, checkpoints of 0.5B parameters and more
LOGPROBS = 1e-4  # decoding against teacher forcing, nats
KERNEL = {"float32": 1e-5, "bfloat16": 1e-2}  # relative to the largest float32 reference entry
GRADIENT = 2e-3  # relative, against enumeration or central differences in float32


def relative_error(found, truth) -> float:
    """max |found − truth| / max |truth|, in float64."""
    found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    return float(np.max(np.abs(found - truth)) / max(np.max(np.abs(truth)), 1e-30))
