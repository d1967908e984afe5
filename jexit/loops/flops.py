"""Model FLOPs of training steps, and `mfu`: what share they are of what the chips could do.

mfu = model FLOPs of a step / (seconds of the step × peak bfloat16 FLOP/s of a device × devices).

Model FLOPs are those of the matrix products that the method asks for (arXiv:2204.02311, appendix
B), a multiply-add counting 2, over real tokens: padding, recomputation by `model.remat` or inside a
kernel, element-wise work and the optimiser add seconds and no FLOPs. Attention counts the pairs of
a query and a key at or before it. For a token, n tokens into its row, in one layer forward:

    4·D·H·(N + K) + 6·D·F                 projections q, k, v, o and the MLP
    + Σ over LoRA's targets 2·R·(in + out)
    + 4·N·H·n                             scores and the average of the values

Backward: frozen weights cost their forward FLOPs once (the gradient to the activations), trained
ones and attention twice. Logits cost 2·D·V a token, the same again for the gradient to the hidden
state, and once more for that to a head that trains. An exit's head costs 4·D² + 4·D forward (2·D
when linear) and twice that backward; the embedding costs nothing.

A step of
- pretraining is a forward and backward pass of the trunk and the logits of every position (each
  exit's too, where they have a loss);
- fine-tuning is a forward and backward pass, and the logits of the references' tokens;
- the first phase of calibration is the teacher's pass with the logits of its final states, and for
  every exit, or one a token, a forward and backward pass of its hazard head and its logits;
- calibration is the teacher's pass, with `sft.target=student` one of the student, the logits of the
  final states and of every exit at the completion's tokens, and for each of the S students a
  forward and backward pass with the logits of its completion;
- RL is the rollouts, the teacher's pass and its logits, and for each of `rl.updates_per_batch` a
  forward and backward pass of the student with its logits, in both of which each prompt counts
  once, for all of its completions. Training runs every layer for every
  token, masked where the token has left, and so it is counted. Rollouts are counted by what ran:
  each prompt once, each token the layers of its own depth and the keys and values of the rest. A
  step's seconds hold the rollouts' too, so `mfu` here is mostly decoding's.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from jexit.config import LoRA
from jexit.kernels.chips import chip
from jexit.model.transformer import Transformer
from jexit.presets import Architecture
from jexit.rollout import Rollouts


def mfu(flops: float, seconds: float, devices: int) -> dict[str, float]:
    """The metric `mfu` of a step, or nothing where the chip's peak is not known."""
    peak = chip().peak_flops
    return {} if peak is None else {"mfu": flops / (seconds * peak * devices)}


class PassSize(NamedTuple):
    """Tokens that a pass computes, and the pairs of a query and a key among them."""

    tokens: int
    pairs: int

    @classmethod
    def of(cls, lengths_B: np.ndarray) -> PassSize:
        """Of whole rows with so many tokens each."""
        lengths_B = np.asarray(lengths_B, np.int64)
        return cls(int(lengths_B.sum()), int((lengths_B * (lengths_B + 1) // 2).sum()))

    @classmethod
    def of_branches(
        cls, trunk_B: np.ndarray, branch_B: np.ndarray, first_B: np.ndarray
    ) -> PassSize:
        """Of branches that see a trunk and themselves; each trunk counts once, at `first_B`."""
        trunk_B, branch_B = np.asarray(trunk_B, np.int64), np.asarray(branch_B, np.int64)
        trunks, branches = cls.of(trunk_B[first_B]), cls.of(branch_B)
        pairs = trunks.pairs + branches.pairs + int((trunk_B * branch_B).sum())
        return cls(trunks.tokens + branches.tokens, pairs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """FLOPs of one model's passes and steps; the module has the formulas."""

    arch: Architecture
    exit_layers: tuple[int, ...]
    exit_kind: str
    rank: int | None  # of the linear continuation, 0 if it is whole; None: frozen
    lora: LoRA | None
    full: bool  # the base weights train

    @classmethod
    def of(cls, model: Transformer, *, full: bool) -> ModelFlops:
        head = model.exit_head
        return cls(
            arch=model.arch,
            exit_layers=model.exit_layers,
            exit_kind=model.exit_head.kind,
            rank=head.continuation_rank if head.continuation == "linear" else None,
            lora=model.lora,
            full=full,
        )

    def forward(self, size: PassSize, *, adapters: bool = True, hazards: bool = False) -> float:
        """One pass through all layers; with `hazards` through every exit's head too."""
        token = self._base() + (self._adapters() if adapters else 0.0)
        layers = self.arch.layers * (token * size.tokens + self._pair() * size.pairs)
        return layers + (len(self.exit_layers) * self._exit_head() * size.tokens if hazards else 0)

    def backward(self, size: PassSize, *, hazards: bool = False) -> float:
        """The gradients that `forward` of the same needs, to what trains."""
        token = (2.0 if self.full else 1.0) * self._base() + 2.0 * self._adapters()
        layers = self.arch.layers * (token * size.tokens + 2.0 * self._pair() * size.pairs)
        heads = 2.0 * len(self.exit_layers) * self._exit_head() * size.tokens
        return layers + (heads if hazards else 0.0)

    def logits(self, tokens: int, *, trained: bool = False) -> float:
        """The output head at so many states; `trained`: with the gradients of a loss on them."""
        products = 1 + (2 if self.full else 1) * trained
        return products * 2.0 * self.arch.width * self.arch.vocab_size * tokens

    def pretrain_step(self, size: PassSize, *, exit_loss: bool) -> float:
        """`size` is of whole texts."""
        losses = 1 + (len(self.exit_layers) if exit_loss else 0)
        passes = self.forward(size) + self.backward(size)
        return passes + losses * self.logits(size.tokens, trained=True)

    def sft_step(
        self, size: PassSize, completion_tokens: int, *, samples: int, target: str
    ) -> float:
        """`size` is of prompts and completions; `target` is `sft.target`."""
        measured = self.forward(size, adapters=False)
        if target == "student":
            measured += self.forward(size)
        measured += (1 + len(self.exit_layers)) * self.logits(completion_tokens)
        return measured + samples * self._student(size, completion_tokens)

    def lens_step(self, tokens: int) -> float:
        """Of the heads alone, on `tokens` at all exits."""
        return 3.0 * len(self.exit_layers) * self._exit_head() * tokens

    def finetune_step(self, size: PassSize, completion_tokens: int) -> float:
        """`size` is of prompts and references, the tokens of the references alone."""
        passes = self.forward(size) + self.backward(size)
        return passes + self.logits(completion_tokens, trained=True)

    def rl_step(self, size: PassSize, completion_tokens: int, *, updates: int) -> float:
        """Scoring and updates, without the rollouts."""
        scored = self.forward(size, adapters=False) + self.logits(completion_tokens)
        return scored + updates * self._student(size, completion_tokens)

    def rollouts(self, rollouts: Rollouts, rows_B: np.ndarray, *, samples: int) -> float:
        """What ran for the rows that the mask `rows_B` picks; a prompt counts with its first."""
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
        """A token in a layer that it skips: keys, values and the continuation's map."""
        width = self.arch.width
        maps = 0.0 if self.rank is None else 2.0 * width * (2 * self.rank or width)
        return self._base("k", "v") + self._adapters("k", "v") + maps

    def compute_fraction(self, depth_fraction: float) -> float:
        """Share of a full pass's FLOPs in the layers that is left at a mean depth, of L.

        A layer that is skipped still costs `skipped_layer`. Without scores of attention.
        """
        skipped = self.skipped_layer() / (self._base() + self._adapters())
        return depth_fraction + (1.0 - depth_fraction) * skipped

    def _student(self, size: PassSize, completion_tokens: int) -> float:
        passes = self.forward(size, hazards=True) + self.backward(size, hazards=True)
        return passes + self.logits(completion_tokens, trained=True)

    def _projections(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each projection."""
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
        """A token in one layer's projections: those named, or all."""
        projections = self._projections()
        return sum(2.0 * math.prod(projections[name]) for name in names or projections)

    def _adapters(self, *names: str) -> float:
        projections, lora = self._projections(), self.lora
        if lora is None:
            return 0.0
        targets = [name for name in names or projections if name in lora.targets]
        return sum(2.0 * lora.rank * sum(projections[name]) for name in targets)

    def _pair(self) -> float:
        """A query and a key in one layer: the score, and the value's part."""
        return 4.0 * self.arch.query_heads * self.arch.head_dim

    def _exit_head(self) -> float:
        width = self.arch.width
        return 2.0 * width if self.exit_kind == "linear" else 4.0 * width**2 + 4.0 * width
