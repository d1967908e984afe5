"""Published memory and speed of accelerators, looked up by JAX's device kind."""

from __future__ import annotations

from typing import NamedTuple

from jexit.kernels.dispatch import target


class Chip(NamedTuple):
    """Published numbers of one accelerator: memory, peak speed, and the inputs to TPU tile sizes.

    Attributes:
      memory_gib: the device memory in GiB.
      peak_flops: the dense bfloat16 FLOP/s, or None if it is not known.
      vmem_mib: the VMEM of one TPU core in MiB; not used for GPUs.
      rows: the number of hidden states per tile at which the matrix products take as long as
        reading the output head. This is the peak FLOP/s divided by the memory bandwidth in
        bytes/s, rounded up to a power of two; not used for GPUs.
    """

    memory_gib: float
    peak_flops: float | None = None
    vmem_mib: int = 16
    rows: int = 256


# The first entry whose key is in JAX's device name applies. The bandwidths behind `rows` are 1.2,
# 0.82, 2.77, 1.64 and 7.4 TB/s. FLOP/s of GPUs are half of those "with sparsity".
CHIPS = {
    "v4": Chip(32, 275e12, 16, 256),
    "v5 lite": Chip(16, 197e12, 128, 256),  # v5e
    "v5e": Chip(16, 197e12, 128, 256),
    "v5": Chip(95, 459e12, 64, 256),  # v5p
    "v6 lite": Chip(32, 918e12, 128, 1024),  # v6e
    "v6e": Chip(32, 918e12, 128, 1024),
    "tpu7": Chip(192, 2307e12, 64, 512),
    "gh200": Chip(94),
    "h200": Chip(139, 989.4e12),
    "h100 nvl": Chip(93),
    "h100 pcie": Chip(79, 756e12),
    "h100 80gb": Chip(79.1, 989.4e12),
    "a100-sxm4-80gb": Chip(79, 312e12),
    "a100 80gb": Chip(79, 312e12),
    "a100-sxm4-40gb": Chip(39, 312e12),
    "a100-pcie-40gb": Chip(39, 312e12),
    "80gb": Chip(79),
    "40gb": Chip(39),
    "h20": Chip(95),
    "b200": Chip(178),
    "l40": Chip(44),
    "l4": Chip(22),
}
UNKNOWN = Chip(16)  # an unknown chip is treated as the smallest


def chip(device_kind: str | None = None) -> Chip:
    """Returns the first entry of `CHIPS` whose key is a part of JAX's device name `device_kind`.

    If `device_kind` is None, looks up the chip of the current compilation target (see `target`). If
    no key matches, returns `UNKNOWN`, a chip with 16 GiB.
    """
    kind = (target().device_kind if device_kind is None else device_kind).lower()
    return next((found for part, found in CHIPS.items() if part in kind), UNKNOWN)
