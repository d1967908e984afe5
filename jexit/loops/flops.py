"""Counts the model FLOPs of training steps, and computes the model FLOPs utilisation (`mfu`).

mfu = model FLOPs of a step / (seconds of the step × peak bfloat16 FLOP/s of a device × devices).

Model FLOPs are those of the matrix products that the method requires (arXiv:2204.02311, appendix
B), for real tokens only. A multiply-add counts as 2 FLOPs. Padding, recomputation (by `model.remat`
or inside a kernel), element-wise work, the embedding and the optimiser take time but count no
FLOPs. Attention counts the pairs of a query and a key at or before the query. With the axis letters
of `jexit.axes`, the n-th token of a row costs, in the forward pass of one layer:

    4·D·H·(N + K) + 6·D·F                 projections q, k, v, o and the MLP
    + Σ over LoRA's targets 2·R·(in + out)
    + 4·N·H·n                             scores and the weighted sum of the values

In the backward pass, frozen weights cost their forward FLOPs once (for the gradient with respect to
the activations); trained weights and attention cost their forward FLOPs twice. Logits cost 2·D·V
per token forward and 2·D·V for the gradient with respect to the hidden state; an output head that
trains costs another 2·D·V for its own gradient. An exit's hazard head costs 4·D² + 4·D forward (2·D
if the head is linear) and twice as much backward. The map of a linear continuation costs 2·D², or
4·D·R with a rank, in each layer; it counts as frozen, which is the default.

The count of a step contains, in
- pretraining: a forward and backward pass of all layers, and the logits of every position; if the
  exits have a loss, also the logits of every position at each exit;
- fine-tuning: a forward and backward pass, and the logits of the references' tokens;
- calibration: the teacher's pass, without `sft.target=teacher` also one of the student, the logits
  of the final states and of every exit (with a linear continuation, after one map of D² to the
  end) at the completions' tokens, and for each of the S = `sft.samples` student runs a forward and
  backward pass with the logits of the completions;
- the last phase of calibration: a forward and backward pass of every exit's hazard head, on stored
  states;
- RL: the rollouts, the teacher's pass with its logits, and for each of `rl.updates_per_batch`
  updates a forward and backward pass of the student with its logits. In the passes of teacher and
  student, each prompt counts once for all of its completions, and all layers count (in the
  student's, all maps of the continuation too), because training computes every layer for every
  token and masks the layers that the token skips. Rollouts count only the work that was done: each
  prompt once, and for each token the layers of its own depth, and the keys, values and continuation
  of the other layers. The seconds of a step include the seconds of its rollouts, so `mfu` in RL
  mostly measures decoding.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from jexit.config import ExitSettings, LoRA
from jexit.kernels.chips import chip
from jexit.model.transformer import Transformer
from jexit.presets import Architecture
from jexit.results import PolicyResult
from jexit.rollout import Rollouts


def mfu(flops: float, seconds: float, devices: int) -> dict[str, float]:
    """Returns {"mfu": utilisation} of a step, or {} if the peak speed of the chip is not known.

    `flops` counts the FLOPs of the step on all `devices` together, and `seconds` is its duration.
    """
    peak = chip().peak_flops
    return {} if peak is None else {"mfu": flops / (seconds * peak * devices)}


class PassSize(NamedTuple):
    """The size of a forward pass: its number of tokens and its number of query-key pairs.

    A pair consists of a token and a token that it attends to: itself or an earlier one.
    """

    tokens: int
    pairs: int

    @classmethod
    def of(cls, lengths_B: np.ndarray) -> PassSize:
        """Returns the size of a pass over unpacked rows, where row i has `lengths_B[i]` tokens."""
        lengths_B = np.asarray(lengths_B, np.int64)
        return cls(int(lengths_B.sum()), int((lengths_B * (lengths_B + 1) // 2).sum()))

    @classmethod
    def of_branches(
        cls, trunk_B: np.ndarray, branch_B: np.ndarray, first_B: np.ndarray
    ) -> PassSize:
        """Returns the size of a pass over B completions (here branches) and their prompts (trunks).

        Completion i, of `branch_B[i]` tokens, attends to itself and to its prompt of `trunk_B[i]`
        tokens. Completions may share a prompt; the boolean mask `first_B` selects one completion
        per prompt, so that each prompt counts once.
        """
        trunk_B, branch_B = np.asarray(trunk_B, np.int64), np.asarray(branch_B, np.int64)
        trunks, branches = cls.of(trunk_B[first_B]), cls.of(branch_B)
        pairs = trunks.pairs + branches.pairs + int((trunk_B * branch_B).sum())
        return cls(trunks.tokens + branches.tokens, pairs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """Counts the FLOPs of one model's passes and steps by the formulas in the module docstring."""

    arch: Architecture
    exit_layers: tuple[int, ...]
    exit_head: ExitSettings
    lora: LoRA | None
    full: bool  # whether the base weights train

    @classmethod
    def of(cls, model: Transformer, *, full: bool) -> ModelFlops:
        return cls(
            arch=model.arch,
            exit_layers=model.exit_layers,
            exit_head=model.exit_head,
            lora=model.lora,
            full=full,
        )

    def forward(self, size: PassSize, *, adapters: bool = True, exits: bool = False) -> float:
        """Returns the FLOPs of a forward pass through all layers, without logits.

        With `exits`, all exit heads read every token, and the continuation maps it in every layer.
        Without `adapters`, LoRA is not counted.
        """
        token = self._base() + (self._adapters() if adapters else 0.0)
        layers = self.arch.layers * (token * size.tokens + self._pair() * size.pairs)
        return layers + (sum(self._exits()) * size.tokens if exits else 0.0)

    def backward(self, size: PassSize, *, exits: bool = False) -> float:
        """Returns the FLOPs of the backward pass that follows `forward(size, exits=exits)`.

        The backward pass of the logits is not included.
        """
        token = (2.0 if self.full else 1.0) * self._base() + 2.0 * self._adapters()
        layers = self.arch.layers * (token * size.tokens + 2.0 * self._pair() * size.pairs)
        heads, maps = self._exits()
        return layers + ((2.0 * heads + maps) * size.tokens if exits else 0.0)

    def logits(self, tokens: int, *, trained: bool = False) -> float:
        """Returns the FLOPs of the output head on `tokens` tokens.

        With `trained`, its backward pass is included.
        """
        products = 1 + (2 if self.full else 1) * trained
        return products * 2.0 * self.arch.width * self.arch.vocab_size * tokens

    def pretrain_step(self, size: PassSize, *, exit_loss: bool) -> float:
        """Returns the FLOPs of a pretraining step; `size` is the size of a pass over all texts.

        `exit_loss` is whether the exits have a loss, which needs their logits.
        """
        losses = 1 + (len(self.exit_layers) if exit_loss else 0)
        passes = self.forward(size) + self.backward(size)
        return passes + losses * self.logits(size.tokens, trained=True)

    def sft_step(
        self, size: PassSize, completion_tokens: int, *, samples: int, target: str
    ) -> float:
        """Returns the FLOPs of a calibration step with `samples` student passes.

        `size` is the size of one pass over the batch, whose completions have `completion_tokens`
        tokens in all, and `target` is the setting `sft.target`.
        """
        measured = self.forward(size, adapters=False)
        if target != "teacher":
            measured += self.forward(size)
        exits = len(self.exit_layers)
        measured += (1 + exits) * self.logits(completion_tokens)
        if self.exit_head.continuation == "linear":  # one map from each exit to the end
            measured += exits * 2.0 * self.arch.width**2 * completion_tokens
        return measured + samples * self._student(size, completion_tokens)

    def lens_step(self, tokens: int) -> float:
        """Returns the FLOPs of a step that trains only the exit heads, each on `tokens` tokens."""
        return 3.0 * len(self.exit_layers) * self._exit_head() * tokens

    def finetune_step(self, size: PassSize, completion_tokens: int) -> float:
        """Returns the FLOPs of a fine-tuning step on prompts and references.

        `size` is the size of one pass over both, and `completion_tokens` counts the references'
        tokens.
        """
        passes = self.forward(size) + self.backward(size)
        return passes + self.logits(completion_tokens, trained=True)

    def rl_step(self, size: PassSize, completion_tokens: int, *, updates: int) -> float:
        """Returns the FLOPs of an RL step without its rollouts: a teacher pass and the updates.

        `size` is the size of one pass over all rollouts and their prompts, and `completion_tokens`
        the total number of generated tokens.
        """
        scored = self.forward(size, adapters=False) + self.logits(completion_tokens)
        return scored + updates * self._student(size, completion_tokens)

    def rollouts(self, rollouts: Rollouts, rows_B: np.ndarray, *, samples: int) -> float:
        """Returns the FLOPs of decoding the rows of `rollouts` that the mask `rows_B` selects.

        Each prompt has `samples` adjacent rows, the first of which carries the prompt's FLOPs.
        """
        length_B, prompt_B = rollouts.lengths_B, rollouts.prompt_lengths_B
        first_B = rows_B & (rollouts.host_rows.index_B % samples == 0)
        flops = self.forward(PassSize.of(prompt_B[first_B])) + self.logits(int(first_B.sum()))
        # The pass that produced token i stands at position prompt + i − 1 and sees itself.
        column_C = np.arange(1, rollouts.depths_BT.shape[1])
        pass_BC = rows_B[:, None] & (column_C < length_B[:, None])
        depth_BC = np.where(pass_BC, rollouts.depths_BT[:, 1:], 0).astype(np.int64)
        passes, layers_run = int(pass_BC.sum()), int(depth_BC.sum())
        flops += layers_run * (self._base() + self._adapters())
        skipped = passes * self.arch.layers - layers_run
        flops += skipped * self.skipped_layer()
        flops += self._pair() * int((depth_BC * (prompt_B[:, None] + column_C)).sum())
        reached = sum(int((depth_BC >= exit_layer).sum()) for exit_layer in self.exit_layers)
        return flops + reached * self._exit_head() + self.logits(passes)

    def skipped_layer(self) -> float:
        """Returns the FLOPs of a token in a skipped layer: keys, values and the continuation."""
        return self._base("k", "v") + self._adapters("k", "v") + self._continuation()

    def compute_fraction(self, result: PolicyResult) -> float:
        """Returns the FLOPs of a policy's layers and decisions, as a fraction of all layers' FLOPs.

        A policy decides at every exit that a token reaches, from a hazard head (`sample`,
        `threshold`) or from all logits (`confidence`); other policies need no decision. The first
        token of a completion takes none, because the prefill produces it, with all layers.
        Attention scores are not counted.
        """
        layer = self._base() + self._adapters()
        decision = {
            "sample": self._exit_head(),
            "threshold": self._exit_head(),
            "confidence": self.logits(1),
        }.get(result.kind, 0.0)
        reached = sum(
            count * sum(exit_layer <= int(depth) for exit_layer in self.exit_layers)
            for depth, count in result.depth_histogram.items()
        )
        decisions = (reached - result.problems * len(self.exit_layers)) / result.tokens
        skipped = (1.0 - result.depth_fraction) * self.skipped_layer() / layer
        return result.depth_fraction + skipped + decisions * decision / (self.arch.layers * layer)

    def _student(self, size: PassSize, completion_tokens: int) -> float:
        passes = self.forward(size, exits=True) + self.backward(size, exits=True)
        return passes + self.logits(completion_tokens, trained=True)

    def _projections(self) -> dict[str, tuple[int, int]]:
        """Returns {name: (input width, output width)} of the projections in a layer."""
        arch = self.arch
        queries, keys = arch.query_heads * arch.head_dim, arch.kv_heads * arch.head_dim
        return {
            "q": (arch.width, queries),
            "k": (arch.width, keys),
            "v": (arch.width, keys),
            "o": (queries, arch.width),
            "gate": (arch.width, arch.mlp_width),
            "up": (arch.width, arch.mlp_width),
            "down": (arch.mlp_width, arch.width),
        }

    def _base(self, *names: str) -> float:
        """Returns the FLOPs of one token in the named projections (default: all) of one layer."""
        projections = self._projections()
        return sum(2.0 * math.prod(projections[name]) for name in names or projections)

    def _adapters(self, *names: str) -> float:
        projections, lora = self._projections(), self.lora
        if lora is None:
            return 0.0
        targets = [name for name in names or projections if name in lora.targets]
        return sum(2.0 * lora.rank * sum(projections[name]) for name in targets)

    def _pair(self) -> float:
        """Returns the FLOPs of one query-key pair in one layer: its score and weighted value."""
        return 4.0 * self.arch.query_heads * self.arch.head_dim

    def _continuation(self) -> float:
        """Returns the FLOPs of one token in the continuation's map of one layer."""
        width, head = self.arch.width, self.exit_head
        linear = head.continuation == "linear"
        return 2.0 * width * (2 * head.continuation_rank or width) if linear else 0.0

    def _exits(self) -> tuple[float, float]:
        """Returns the FLOPs of one token in all exit heads, and in all maps of the continuation."""
        heads = len(self.exit_layers) * self._exit_head()
        return heads, self.arch.layers * self._continuation()

    def _exit_head(self) -> float:
        width = self.arch.width
        return 2.0 * width if self.exit_head.kind == "linear" else 4.0 * width**2 + 4.0 * width
