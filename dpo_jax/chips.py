"""TPUs as they are sold: what a chip can do, and the pods that exist; and what GPUs can do."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies


@dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      flops: of bf16 products, FLOP/s.
      hbm: bytes/s of its memory.
      ici: bytes/s that it sends along one axis of the torus, both ways.
      memory: bytes of its memory that a program may use.
      pods: topologies, from small to large.
      options: what the compiler must be told beside the name.
    """

    flops: float
    hbm: float
    ici: float
    memory: int
    pods: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()


_GIB = 2**30
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")

# Google Cloud's published figures; usable memory is what the compiler allows.
CHIPS = {
    "v4": Chip(275e12, 1.2e12, 9e10, int(30.75 * _GIB), _CUBES, (("chip_config_name", "megacore"),)),
    "v5e": Chip(197e12, 8.1e11, 9e10, int(15.75 * _GIB), _FLAT),
    "v5p": Chip(459e12, 2.8e12, 1.8e11, int(95.73 * _GIB), _CUBES),
    "v6e": Chip(918e12, 1.6e12, 1.8e11, int(31.24 * _GIB), _FLAT),
}


# What jax calls them.
_DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}

# FLOP/s of dense bf16 products, from NVIDIA's data sheets; by what jax calls them.
_GPUS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """FLOP/s of bf16 products of all devices together; None where they are not known."""
    known = {**_GPUS, **{name: CHIPS[kind].flops for name, kind in _DEVICE_KINDS.items()}}
    rates = [known.get(device.device_kind) for device in devices]
    return None if None in rates else sum(rate for rate in rates if rate)


def parse(topology: str) -> tuple[Chip, str]:
    """The chip of ``v5e:4x4`` and the name of its kind.

    Raises:
      ValueError: no such chip or pod; those that exist are listed.
    """
    kind, _, pod = topology.partition(":")
    if kind not in CHIPS:
        raise ValueError(f"unknown topology {topology!r}; expected KIND:SHAPE with a kind of {', '.join(CHIPS)}")
    if pod not in CHIPS[kind].pods:
        known = ", ".join(f"{kind}:{name}" for name in CHIPS[kind].pods)
        raise ValueError(f"unknown topology {topology!r}; of {kind} there are {known}")
    return CHIPS[kind], kind


def describe_devices(topology: str) -> Sequence[Any]:
    """The chips of a pod that is not here, to compile programs for.

    Raises:
      ValueError: no such pod.
      OSError: the TPU compiler is not installed.
    """
    chip, _ = parse(topology)
    # The compiler would otherwise ask the network which TPU this machine is.
    settings = dict(TPU_ACCELERATOR_TYPE="v5litepod-16", TPU_WORKER_HOSTNAMES="localhost", TPU_SKIP_MDS_QUERY="1")
    for name, value in {**settings, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)  # keep none: they cannot be read back
    try:
        # Small v5e and v6e slices have fewer chips than a host of a large one.
        single = {"chips_per_host_bounds": [1, 1, 1]} if topology.endswith(":1x1") else {}
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **dict(chip.options), **single)
        return list(found.devices)
    except (ImportError, RuntimeError) as error:
        raise OSError(
            f"there is no TPU compiler here ({error}); install it with pip install -r requirements-tpu.txt"
        ) from error
