"""Encoders on four simulated devices, fsdp 2 x tensor 2, give the same outputs and gradients as on one device."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, simulated
from tests.encoder_mesh import MODULES


@pytest.mark.long
@pytest.mark.parametrize("name", MODULES)
def test_encoder(name):
    command = [sys.executable, "-m", "tests.encoder_mesh", name]
    done = subprocess.run(command, cwd=ROOT, env=simulated(4), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["output"] <= 1e-5 and found["gradient"][0] <= 1e-4, found
