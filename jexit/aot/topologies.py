"""Named descriptions of accelerators, for compilation on machines that lack them.

`v5e:2x2`, `v5p:2x2x1` and `v6e:4x4` name a TPU generation and a slice of it, and need libtpu.
`h100:8` names the GPUs of one node, and needs JAX's CUDA plugin but not CUDA itself. The command
`launch/run.sh --aot=NAME` installs the packages that the name needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jexit.errors import UserError
from jexit.kernels.dispatch import compiling_for

TPUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}  # axes of a slice
MAX_AXIS = 16  # chips; libtpu aborts the process for a longer axis

# The H100 SXM5 80 GB, in the format of XLA's description of a GPU.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
GPUS = {"h100": H100}
CUDNN = 90_800  # version 9.8, as described above


@dataclasses.dataclass(frozen=True)
class Topology:
    """Absent devices that programs can be compiled for, but not run on."""

    name: str
    platform: str  # "tpu" or "gpu"
    devices: list[jax.Device]

    @property
    def device_kind(self) -> str:
        return self.devices[0].device_kind

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Makes code traced in this context use implementations and tile sizes for this topology.

        To lower Pallas kernels, JAX reads the chip from the abstract mesh. This context sets such a
        mesh, for code that sets none itself.
        """
        device = AbstractDevice(self.device_kind, None, self.platform)
        mesh = AbstractMesh((), (), abstract_device=device)
        with (
            compiling_for(self.platform, self.device_kind),
            use_abstract_mesh(mesh),
            _described_cudnn(),
        ):
            yield


@contextlib.contextmanager
def _described_cudnn() -> Iterator[None]:
    """Allows cuDNN's attention to be traced on a machine without cuDNN.

    JAX asks the installed cuDNN for its version, records it and refuses features that an old
    version lacks. In this context the answer is version 9.8. The compiled program calls cuDNN only
    when it runs.
    """
    asked = cudnn.check_cudnn_version
    cudnn.check_cudnn_version = lambda: CUDNN
    try:
        yield
    finally:
        cudnn.check_cudnn_version = asked


def get_topology(name: str) -> Topology:
    """Returns the absent devices that a name such as `v5e:4x4` or `h100:8` describes.

    Raises UserError if the name is not known, if the slice does not exist, or if the compiler for
    these devices is not installed.
    """
    kind, _, size = name.partition(":")
    if kind in TPUS and re.fullmatch(rf"\d+(x\d+){{{TPUS[kind] - 1}}}", size):
        if max(map(int, size.split("x"))) > MAX_AXIS:
            raise UserError(
                f"slice {name} has an axis of more than {MAX_AXIS} chips, but libtpu supports at "
                f"most {MAX_AXIS}; use a smaller slice, whose devices need almost the same memory"
            )
        return _tpu(name)
    if kind in GPUS and re.fullmatch(r"[1-9]\d*", size):
        return _gpu(name, GPUS[kind], int(size))
    tpus = ", ".join(f"{kind}:{'x'.join('2' * axes)}" for kind, axes in TPUS.items())
    raise UserError(f"topology {name!r} is not known; use one like {tpus} or h100:8")


def _tpu(name: str) -> Topology:
    if "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"compiling for {name} needs libtpu, which is not installed; run the command through "
            "launch/run.sh, which installs it, or set TPU_LIBRARY_PATH to the path of libtpu.so"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # On real chips JAX treats a v4 chip's two cores as one device; libtpu's default is two devices.
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    if name.endswith(":1x1"):  # by itself libtpu looks for whole hosts of several chips
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        described = topologies.get_topology_desc(name, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"libtpu has no slice {name} ({reason}); use one that Cloud TPU offers, such as 2x2"
        ) from error
    return Topology(name, "tpu", list(described.devices))


def _gpu(name: str, description: str, count: int) -> Topology:
    plugins = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
    if not any(_installed(plugin) for plugin in plugins):
        raise UserError(
            f"compiling for {name} needs JAX's CUDA plugin, which is not installed; run the "
            "command through launch/run.sh, which installs it"
        )
    # Without a GPU nothing can be timed; left on, auto-tuning fails. Untuned Triton products refuse
    # some widths, such as the 112 columns of a layer of the tiny model and its adapter.
    for flag in ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false"):
        if flag not in os.environ.get("XLA_FLAGS", ""):
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    topology = f"1x1x{count}"
    try:
        described = topologies.get_topology_desc(
            topology, platform="cuda", topology=topology, target_config=description
        )
    except NotImplementedError as error:  # JAX has looked for a GPU already, and found none
        raise UserError(
            f"compiling for {name} on a machine without a GPU needs the environment variable "
            "JAX_PLATFORMS=cpu; set it and run the command again"
        ) from error
    return Topology(name, "gpu", list(described.devices))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
