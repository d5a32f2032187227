"""Devices and timelines for tests of the planner, without the TPU compiler."""

from types import SimpleNamespace

import numpy as np

from jaxmllm.plan import hlo
from jaxmllm.plan.chips import CHIPS, topology
from jaxmllm.plan.timeline import Charge, Timeline
from jaxmllm.plan.traffic import Network
from tests.conftest import ROOT

V5P = CHIPS["v5p"]


def stored(name: str) -> str:
    """The text of a program in tests/hlo."""
    return (ROOT / "tests" / "hlo" / f"{name}.txt").read_text()


def mesh_devices(shape: tuple[int, ...], torus: str = "v5p:2x2x1", slices: int = 1) -> np.ndarray:
    """An array of the devices of slices, in row-major order of their torus."""
    coords = list(np.ndindex(*topology(torus).shape))
    devices = np.empty(shape, object)
    for i in range(devices.size):
        slice_index, place = divmod(i, len(coords))
        assert slice_index < slices
        devices.flat[i] = SimpleNamespace(coords=coords[place], core_on_chip=0, slice_index=slice_index)
    return devices


def network(shape: tuple[int, ...], axes: tuple[str, ...], torus: str = "v5p:2x2x1", slices: int = 1) -> Network:
    """The network of a mesh of these devices."""
    return Network(topology(torus, slices), axes, mesh_devices(shape, torus, slices))


def timeline(name: str, shape=(1,), axes=("fsdp",), torus="v5p:2x2x1") -> Timeline:
    """The timeline of a program in tests/hlo."""
    return Timeline(hlo.parse(stored(name)), topology(torus).chip, network(shape, axes, torus))


def only_charge(text: str) -> Charge:
    """The only charge of a program for one v5p chip."""
    (charge,) = Timeline(hlo.parse(text), V5P, network((1,), ("fsdp",))).charges
    return charge
