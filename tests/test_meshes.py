"""The tiny recipe on simulated devices: loss and gradients are equal on every mesh, and only weights are sent around.

The fast case uses all axes except slice at once, with rematerialisation and scans. The long ones are all the others.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxmllm import mesh as meshes
from jaxmllm import sharded
from jaxmllm.recipes import load, override
from jaxmllm.train.setup import stage_program
from tests import equal_meshes
from tests.conftest import ROOT, simulated

FAST = "data=2,fsdp=2,tensor=2,context=2/remat/scan"
SINGLE = [f"{axis}={n}" for axis in ("data", "fsdp", "tensor", "context") for n in (1, 2, 4, 8)]
JOINT = [
    "data=2,fsdp=2,tensor=2",
    "fsdp=2,context=4",
    "data=4,tensor=2",
    "tensor=2,context=4",
    "slice=2,fsdp=2,tensor=2",
]
WAYS = ["fsdp=1/remat", "fsdp=1/scan", "fsdp=1/rows", "fsdp=1/parts", "fsdp=8/remat", "tensor=8/scan",
        "context=8/remat/scan", "data=2,fsdp=2,tensor=2/rows", "fsdp=2,context=4/parts"]  # fmt: skip

# Loss and gradients are sums of up to 1e5 terms in float32 (eps 1.2e-7), which every mesh adds up in its own order, so
# they differ by some sqrt(n) eps at most. The bound of a gradient is relative to the largest value of its array (or to
# a thousandth of the largest value of all gradients, if that is more: the gradient of a key's bias is 0). A sum that
# leaves out a device or counts one twice is off by far more.
LOSS_BOUND, GRADIENT_BOUND = 1e-6, 1e-5


def compare(cases: list[str], devices: int) -> list[dict]:
    """The lines that tests.equal_meshes prints."""
    command = [sys.executable, "-m", "tests.equal_meshes", *cases]
    done = subprocess.run(command, cwd=ROOT, env=simulated(devices), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["case"] for line in lines] == cases
    return lines


def check_equal(line: dict) -> None:
    assert max(line["metrics"].values()) <= LOSS_BOUND and line["gradient"][0] <= GRADIENT_BOUND, line
    assert line["metrics"].keys() >= {"loss", "next_token", "depth", "seg", "grad_norm"} and not line["zero"]


@pytest.fixture(scope="module")
def fast():
    """Lines of the fast case, of the wrong program, and of the case with one sample per row."""
    return compare([FAST, "wrong", "fsdp=1/rows"], 16)


def test_loss_and_gradients_are_equal_with_four_axes_at_once(fast):
    check_equal(fast[0])


def test_samples_of_a_row_do_not_mix(fast):
    check_equal(fast[2])


@pytest.mark.long
@pytest.mark.parametrize("cases", [SINGLE, JOINT, WAYS], ids=["single", "joint", "ways"])
def test_loss_and_gradients_are_equal_on_every_mesh(cases):
    for line in compare(cases, 8):
        check_equal(line)
        assert not line["activations"], line


# Component -> how many of its weights that are split over fsdp are gathered in one step: in the forward pass, and again
# for the backward pass where blocks are computed again. A ViT block has q, k, v, out, up and down; a decoder block has
# gate as well. The loss gathers four chunks of the output table, each during the work on the one before, and in the end
# one that is not used.
GATHERED = {
    "encoder_clip": (2 * 6 + 1, 2 * 6),  # two layers and the patch kernel
    "encoder_dino": (2 * 6 + 1, 2 * 6),
    "fuser_clip": (2 * 4, 0),  # two attentions: offsets, weights, values, output
    "aggregator": (3 * 2 + 11, 11),  # three projectors of two layers, and one SVA layer, which is computed again
    "llm": (3 * 7 + 1, 3 * 7),  # three layers and the embedding
    "llm_insert": (11, 11),  # one SVA layer
    "next_token": (5, 5),
    "objective_depth": (5, 0),  # input projection, q, k, v, out
    "objective_seg": (5, 0),
}
# How many gradients of split weights are summed over the data axes: on a TPU one per weight. The CPU's compiler sums
# the gradients of a weight that is used twice one by one (input projection, k and v of both teachers' predictors).
WEIGHTS = sum(n for n, _ in GATHERED.values()) - 1  # the unused chunk has no gradient
SUMMED = {"cpu": WEIGHTS + 2 * 3, "tpu": WEIGHTS}
# Component -> how many activations its scanned blocks (three, two, two) sum over tensor: in the forward pass (outputs
# of attention and MLP), when that is repeated (only the output of attention, since nothing there uses the MLP's), and
# in the backward pass (inputs of attention and MLP; the CPU's compiler sums those of q, k, v, up and gate one by one).
LOOPED = {
    "cpu": {"llm": (6, 3, 15), "encoder_clip": (4, 2, 8), "encoder_dino": (4, 2, 8)},
    "tpu": {"llm": (6, 3, 6), "encoder_clip": (4, 2, 4), "encoder_dino": (4, 2, 4)},
}


def check_sent(program: dict, kind: str) -> None:
    """No activation crosses the data axes; weights are gathered and gradients are summed as often as stated above."""
    assert not program["activations"]
    # In the forward pass the TPU's compiler leaves out the unused chunk. It also turns the loop over one SVA layer into
    # straight code and merges its repetition with the first time, so seven weights are gathered only once.
    expected = GATHERED | ({"next_token": (4, 5), "aggregator": (9, 12)} if kind == "tpu" else {})
    gathered = {name: tuple(count) for name, count in program["gathered"].items()}
    # XLA of jaxlib 0.12 leaves the name of some gathers out, those of the forward pass that have no backward pass.
    unnamed = gathered.pop("other", (0, 0))
    for part in (0, 1):
        missing = {name: count[part] - gathered.get(name, (0, 0))[part] for name, count in expected.items()}
        assert min(missing.values()) >= 0 and sum(missing.values()) == unnamed[part], (part, missing, unnamed)
    assert gathered.keys() <= expected.keys()
    assert program["summed"] == SUMMED[kind]
    assert {name: tuple(count) for name, count in program["looped"].items()} == LOOPED[kind]


def test_only_weights_and_their_gradients_cross_data_shards(fast):
    check_sent(fast[0], "cpu")


def test_features_sent_across_data_shards_are_found(fast):
    paths = fast[1]["activations"]
    # The resharded features, by the name of the part that makes or reads them.
    assert len(paths) == 3 and any("jvp(fuser_clip)" in path or "jvp(encoder_clip)" in path for path in paths)
    assert any("transpose(jvp(aggregator))" in path for path in paths)  # the gradient of the learned array in all rows


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='needs the TPU compiler: pip install "jaxmllm[tpu]"'
)
def test_only_weights_and_their_gradients_cross_data_shards_on_a_tpu(monkeypatch):
    from jaxmllm.plan.chips import topology
    from jaxmllm.plan.compile import devices_of, prepare
    from jaxmllm.train.compiler import options

    prepare()
    monkeypatch.setattr(sharded, "MIN_FSDP_SIZE", equal_meshes.MIN_FSDP_SIZE)
    case = "data=2,fsdp=2,tensor=2/remat/scan"
    program = equal_meshes.make_program(case, devices_of(topology("v5p:2x2x2")), options)
    with jax.set_mesh(program.mesh):
        text = program.lower().compile().as_text()
    check_sent(equal_meshes.sent(program, text), "tpu")


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["mesh.tensor=4"], "encoders_clip/blocks/layers/block/attn/q/kernel (32, 2, 1, 16): dimension 1 (heads, 2)"),
        (["mesh.context=8", "data.seq_len=252"], "tokens of a micro-batch (8, 252): dimension 1 (length, 252)"),
        (
            ["mesh.data=8", "stages.instruct.accumulate=2", "data.seq_len=256"],
            "tokens of a micro-batch (4, 256): dimension 0 (batch, 4)",
        ),
    ],
)
def test_a_dimension_that_does_not_divide_is_named(overrides, says):
    run = override(load("configs/toy.py:tiny"), ["mesh.fsdp=1", *overrides])
    sizes = tuple(getattr(run.mesh, axis) for axis in meshes.AXES)
    abstract = AbstractMesh(sizes, meshes.AXES, axis_types=(AxisType.Explicit,) * len(sizes))
    with jax.sharding.use_abstract_mesh(abstract), pytest.raises(ValueError) as error:
        stage_program(run, run.stages[-1], abstract)
    axis, message = overrides[0].removeprefix("mesh.").split("=")[0], str(error.value)
    assert says in message and f"mesh axis {axis}" in message.replace("slice x ", "")
