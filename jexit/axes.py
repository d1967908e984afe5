"""The letters for axes in the names of arrays, and jaxtyping types for common arrays.

| letter | axis | letter | axis |
|---|---|---|---|
| B | batch | F | MLP width |
| T | query time | V | vocabulary |
| S | key time | L | layers |
| D | model width | E | exits |
| N | query heads; tokens in kernels, problems in evaluation | G | rollouts of one prompt |
| K | key/value heads | R | LoRA rank; runs in evaluation |
| H | head dimension | P | rows of a decoding pool |
| J | completions (rows may have several) | W | tokens of one completion |
| C | completion tokens of a row | M | tokens of several rows, in one axis |
| Z | data shards | Q | prompts of a data shard |
| Y | segments of the layers between exits | U | drafted tokens of a row |
| I | random draws of a statistic | X | an axis without a letter of its own |

A name such as `hazard_logits_BTE` has one axis per letter, in that order. In a jaxtyping type, `*A`
stands for any number of axes. Depths are int32 layer counts (1 … L), never indices into the exits.
"""

from jaxtyping import Array, Bool, Float, Int, Key

TokensBT = Int[Array, "B T"]
PositionsBT = Int[Array, "B T"]
LengthsB = Int[Array, "B"]
DepthBT = Int[Array, "B T"]
MaskBT = Bool[Array, "B T"]
SegmentBT = Int[Array, "B T"]
HiddenBTD = Float[Array, "B T D"]
ExitHiddenEBTD = Float[Array, "E B T D"]
HazardLogitsBTE = Float[Array, "B T E"]
LogitsBTV = Float[Array, "B T V"]
CacheKLPSH = Float[Array, "K L P S H"]
PRNGKey = Key[Array, ""]
