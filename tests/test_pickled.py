"""PyTorch checkpoints are read without torch and cannot run any code."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest

from jaxmllm.weights.pickled import MAGIC, open_pickled


class Evil:
    def __reduce__(self):
        return os.system, ("touch {}",)


def stream(path, *parts):
    path.write_bytes(b"".join(part if isinstance(part, bytes) else pickle.dumps(part, 2) for part in parts))
    return path


def test_nothing_can_be_called(tmp_path):
    name = f"{os.system.__module__}.system"
    with pytest.raises(ValueError, match=f"it calls {name}, which is not allowed in a file of weights"):
        open_pickled(stream(tmp_path / "evil.pth", MAGIC, 1001, {}, {"a": Evil()}, []))


@pytest.mark.parametrize(
    "parts, message",
    [
        ((b"damaged",), "cannot read"),
        ((MAGIC, 1001, {}), "it ends before its tensors do"),
        ((MAGIC + 1, 1001, {}, {}, []), "it is not a PyTorch checkpoint"),
    ],
)
def test_damaged(parts, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_pickled(stream(tmp_path / "a.pth", *parts))


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [False, True])
def test_as_torch_reads_it(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.randn(4, 6)
    tensors = {
        "plain": base,
        "transposed": base.T,
        "part": base[1:3, 2:],
        "half": base.half(),
        "parameter": torch.nn.Parameter(base),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 3),
    }
    for wrapped in (tensors, {"state_dict": tensors, "epoch": 3}):
        torch.save(wrapped, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        found = open_pickled(tmp_path / "a.pth")
        assert found.keys() == tensors.keys()
        for name, x in tensors.items():
            np.testing.assert_array_equal(found[name], x.detach().numpy())
            assert found[name].dtype == x.detach().numpy().dtype
    assert open_pickled(tmp_path / "a.pth")["part"].flags.c_contiguous
    torch.save({"a": base.bfloat16()}, tmp_path / "b.pth", _use_new_zipfile_serialization=zipped)
    np.testing.assert_array_equal(open_pickled(tmp_path / "b.pth")["a"], base.bfloat16().float().numpy())


@pytest.mark.torch
def test_view_beyond_its_storage(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a.pth").read_bytes()
    assert content.count(b"K\x03\x85") == 1  # the shape (3,)
    (tmp_path / "a.pth").write_bytes(content.replace(b"K\x03\x85", b"K\x04\x85"))
    with pytest.raises(ValueError, match=r"a tensor of shape \(4,\) reaches beyond its storage of 3 numbers"):
        open_pickled(tmp_path / "a.pth")
