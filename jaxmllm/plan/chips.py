"""What TPU chips can do. Figures are per JAX device: a chip, except on tpu7x, where a device is half a chip.

Sources: peak and HBM from Google's Cloud TPU system architecture pages (v4, v5e, v5p, v6e, tpu7x); clock = peak / bf16
operations per cycle of the matrix units (v4, v5p: 2 cores x 4 units of 128 x 128; v5e: 4 such units; v6e: 2 units of
256 x 256 per core, 524,288 operations a cycle); link rates from "How to Scale Your Model"
(jax-ml.github.io/scaling-book, chapter 2), for tpu7x from the 1,200 GB/s per chip on its page. `hbm_usable` is what the
compiler says it may use (in the message for a program that does not fit, libtpu 0.0.42).
"""

from __future__ import annotations

import dataclasses
import math

from jaxmllm.errors import suggest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures per JAX device. Rates are per second, memory in bytes."""

    name: str
    clock: float
    flops: float  # bf16, dense
    hbm_rate: float
    hbm_usable: int
    link_rate: float  # bytes/s of one link, one way
    torus_dims: int  # dimensions of the interconnect
    ring_multiple: int  # a dimension is a ring when its length is a multiple of this
    dcn_rate: float = 6.25e9  # bytes/s per chip, one way: 25 GB/s per host of 4 chips
    host_rate: float = 1.6e10  # bytes/s between HBM and host memory
    devices_per_chip: int = 1
    cores: int = 1  # TensorCores per JAX device
    topology_options: tuple[tuple[str, str], ...] = ()  # for get_topology_desc

    @property
    def flops_per_cycle(self) -> float:
        return self.flops / self.clock

    @property
    def hbm_per_cycle(self) -> float:
        """Bytes that HBM moves in a cycle."""
        return self.hbm_rate / self.clock


CHIPS = {
    "v4": Chip(
        "v4",
        1.05e9,
        275e12,
        1.2e12,
        int(30.75 * GIB),
        4.5e10,
        3,
        4,
        cores=2,
        topology_options=(("chip_config_name", "megacore"),),
    ),
    "v5e": Chip("v5e", 1.5e9, 197e12, 8.19e11, int(15.75 * GIB), 4.5e10, 2, 16, dcn_rate=3.125e9),
    "v5p": Chip("v5p", 1.75e9, 459e12, 2.765e12, int(95.74 * GIB), 9e10, 3, 4, cores=2),
    "v6e": Chip("v6e", 1.75e9, 918e12, 1.638e12, int(31.25 * GIB), 9e10, 2, 16, host_rate=3.2e10, dcn_rate=3.125e9),
    "tpu7x": Chip("tpu7x", 2.2e9, 1153.5e12, 3.69e12, int(94.75 * GIB), 9e10, 3, 4, devices_per_chip=2),
}

# bf16 FLOP/s of one device by the start of its device_kind. GPUs: NVIDIA's data sheets, dense, SXM.
PEAKS = {
    "TPU v4": CHIPS["v4"].flops, "TPU v5 lite": CHIPS["v5e"].flops, "TPU v5": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops, "TPU7x": CHIPS["tpu7x"].flops,
    "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12,
}  # fmt: skip


def peak_of(kind: str) -> float | None:
    """bf16 FLOP/s of a device by its device_kind, None if it is not known."""
    return next((value for name, value in PEAKS.items() if kind.startswith(name)), None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, e.g. v5p:4x4x4 (64 chips), or several such slices joined by the data-centre network."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices


def topology(text: str, slices: int = 1) -> Topology:
    """ "v5p:4x4x4" -> Topology. Raises ValueError for an unknown chip or a wrong shape."""
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise ValueError(f"--topology {text}: no chip {name!r}{suggest(name, CHIPS)}")
    sizes = shape.split("x")
    if not all(size.isdigit() and int(size) for size in sizes) or len(sizes) != CHIPS[name].torus_dims:
        example = "x".join(["4"] * CHIPS[name].torus_dims)
        raise ValueError(f"--topology {text}: write the shape of a {name} slice as {name}:{example}")
    return Topology(CHIPS[name], tuple(map(int, sizes)), slices)
