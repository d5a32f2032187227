"""Reading, pricing and timing of stored programs, without the TPU compiler.

tests/hlo/ holds what the TPU compiler (libtpu 0.0.42) made for one or a few v5p chips: scan.txt, five layers of
tanh(x @ w) with 512 x 512 weights; rows.txt, a gather and a scatter of 1024 rows of 256 bfloat16, and a sort;
sharded.txt, the gradient of a two-layer MLP on fsdp 2 x tensor 2; windowed.txt, a matmul of 16 chips whose weight is
gathered in parts while it multiplies.
"""

import numpy as np
import pytest

from jaxmllm.plan import hlo, report
from jaxmllm.plan.chips import CHIPS, topology
from jaxmllm.plan.timeline import Timeline, component, phase, saved_bytes
from jaxmllm.plan.traffic import first_group
from tests.plan_case import V5P, network, timeline


def test_a_loop_costs_its_trips():
    line = timeline("scan")
    loop = next(i for i in line.module.computations[line.module.entry].values() if i.opcode == "while")
    (body, trips), *_ = line.module.calls(loop, line.module.computations[line.module.entry])
    assert trips == 5
    inside = line.module.computations[body].values()
    once = sum(i.cycles for i in inside if i.cycles)
    looped = [c for c in line.charges if c.times == 5]
    assert once > 0 and sum(c.cycles for c in looped if not c.model) == 5 * once
    matmul = max(line.charges, key=lambda c: c.cycles)
    ideal = 5 * 2 * 512**3 / V5P.flops_per_cycle
    assert matmul.kind == "matmul" and matmul.cycles > ideal


BRANCHES = """HloModule m
%yes (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %twice = f32[8]{0} add(%p, %p)
}
%no (q: f32[8]) -> f32[8] {
  ROOT %q = f32[8]{0} parameter(0)
}
ENTRY %main (i: s32[], x: f32[8]) -> f32[8] {
  %i = s32[] parameter(0)
  %x = f32[8]{0} parameter(1)
  ROOT %c = f32[8]{0} conditional(%i, %x, %x), branch_computations={%no, %yes}, metadata={op_name="jit(f)/SCOPE/cond"}
}
"""


def test_a_branch_costs_its_share_of_the_runs():
    def calls(scope):
        module = hlo.parse(BRANCHES.replace("SCOPE", scope))
        computation = module.computations[module.entry]
        return module.calls(computation["c"], computation)

    assert calls("insert/10_of_32") == [("yes", 10 / 32), ("no", 22 / 32)]
    assert calls("insert") == [("yes", 1)]


def test_layers_with_a_window_have_their_share_of_the_runs():
    text = BRANCHES.replace("%q = f32[8]{0} parameter(0)", "%q = f32[8]{0} parameter(0)%WHERE")

    def calls(scope, inside):
        where = f', metadata={{op_name="jit(f)/cond/{inside}/x"}}'
        module = hlo.parse(text.replace("SCOPE", scope).replace("%WHERE", where))
        computation = module.computations[module.entry]
        return module.calls(computation["c"], computation)

    assert calls("windowed_24_of_32/insert/10_of_32", "window_512_of_4096") == [("no", 24 / 32), ("yes", 8 / 32)]
    assert calls("windowed_24_of_32/insert/10_of_32", "full") == [("yes", 10 / 32), ("no", 22 / 32)]
    assert calls("windowed_24_of_32", "full") == [("yes", 1)]


def test_rows_and_sorts_are_priced_and_listed():
    charges = [c for c in timeline("rows").charges if c.model in ("gather", "sort")]
    prices = sorted(c.cycles for c in charges if c.model == "gather")
    assert prices == [1024 * 64, 2 * 1024 * 64]  # moving 512 bytes takes less than 64 cycles
    assert any(c.model == "sort" for c in charges)
    assert all(c.model in report.MODELS for c in charges)


def test_collectives_name_their_axis_and_bytes():
    line = timeline("sharded", (2, 2), ("fsdp", "tensor"))
    moved = {c.name: c.transfer for c in line.charges if c.transfer}
    assert {t.axes for t in moved.values()} == {"fsdp"}
    gather = next(t for t in moved.values() if t.opcode == "all-gather")
    full = 1024 * 2048 * 2
    assert gather.bytes == full / 2
    # The two chips are neighbours in a dimension of length 2, which does not wrap around: one link.
    assert gather.ici == pytest.approx(full / 2 / V5P.link_rate + 1e-6)
    reduce = next(t for t in moved.values() if t.opcode == "all-reduce")
    assert reduce.bytes == 2 * full  # both gradients; half of each goes through the links, twice
    assert sum(c.exposed for c in line.charges) == pytest.approx(sum(t.seconds for t in moved.values()))


def test_windowed_matmul_is_priced_by_roofline():
    line = timeline("windowed", (16,), ("fsdp",), "v5p:2x2x4")
    matmuls = [c for c in line.charges if c.kind == "matmul"]
    ideal = 2 * 1024 * 512 * 1024 / V5P.flops_per_cycle
    assert any(c.model == "windowed matmul" for c in matmuls)
    assert ideal < sum(c.cycles for c in matmuls)
    assert {c.transfer.opcode for c in line.charges if c.transfer} == {"collective-permute"}


def test_rings_and_slices():
    ring = network((64,), ("fsdp",), "v5p:4x4x4")
    assert ring.rate(np.arange(64)) == (6 * V5P.link_rate, 6)  # three rings, two links each
    line = network((8, 8), ("data", "fsdp"), "v6e:8x8")
    assert line.rate(np.arange(8))[0] == CHIPS["v6e"].link_rate  # 8 chips in a row do not wrap around
    two = network((2, 4), ("slice", "fsdp"), "v5p:2x2x1", slices=2)
    carrier = one_line("all-reduce", "f32[1000000]{0}", "replica_groups={{0,1,2,3,4,5,6,7}}")
    transfer = two.transfer("all-reduce", carrier)
    assert transfer.axes == "slice+fsdp" and transfer.ici > 0
    assert transfer.dcn == pytest.approx(2 * 4e6 / 4 / 2 / V5P.dcn_rate)  # every chip sends its quarter across


def one_line(opcode: str, shape: str, attributes: str) -> hlo.Instruction:
    return hlo.parse_line(f"  %x = {shape} {opcode}(%y), {attributes}", {})


@pytest.mark.parametrize(
    "groups, expected",
    [
        ("replica_groups={{0,4},{1,5}}", [0, 4]),
        ("replica_groups={}", list(range(8))),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", [0, 4]),
        ("source_target_pairs={{3,7},{7,3}}", [3, 7]),
    ],
)
def test_replica_groups(groups, expected):
    assert first_group(one_line("all-reduce", "f32[8]{0}", groups), 8).tolist() == expected


def test_asynchronous_collectives_are_exposed_only_where_nothing_runs_beside_them():
    work = '%w = bf16[8]{0} fusion(%p), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"%d"}'
    text = """HloModule m
%f (q: bf16[8]) -> bf16[8] {
  %q = bf16[8]{0} parameter(0)
  ROOT %n = bf16[8]{0} negate(%q)
}

ENTRY %main (p: bf16[8]) -> bf16[8] {
  %p = bf16[8]{0} parameter(0)
  %s = (bf16[1000000]{0}, bf16[2000000]{0}) all-gather-start(%p), replica_groups={{0,1}}, dimensions={0}
  WORK
  ROOT %d = bf16[2000000]{0} all-gather-done(%s)
}
"""
    seconds = 2e6 / V5P.link_rate + 1e-6
    for share in (0.25, 2.0):
        cycles = int(seconds * share * V5P.clock)
        module = hlo.parse(text.replace("WORK", work.replace("%d", str(cycles))))
        line = Timeline(module, V5P, network((2,), ("fsdp",)))
        assert sum(c.exposed for c in line.charges) == pytest.approx(seconds * max(0, 1 - share), abs=1e-8)
        assert line.seconds == pytest.approx(seconds * max(1, share), rel=1e-3)


def test_programs_that_cannot_be_read_say_so():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("module {}")
    with pytest.raises(ValueError, match="replica groups"):
        first_group(one_line("all-reduce", "f32[8]{0}", "replica_groups=?"), 8)


@pytest.mark.parametrize(
    "path, where, when",
    [
        ("jit(step)/jvp(MLLM)/MLLM.hidden/MLLM.visual/encoder_clip/blocks/while/body/add", "encoder_clip", "forward"),
        (
            "jit(step)/transpose(jvp(MLLM))/MLLM.hidden/llm/llm/layers/while/body/insert/1_of_4/cond/branch_1_fun/mul",
            "llm_insert",
            "backward",
        ),
        ("jit(step)/jvp(MLLM)/next_token/while/body/closed_call/logits/bch,vh->bcv/dot_general", "head", "forward"),
        ("jit(step)/transpose(jvp(MLLM))/next_token/while", "next_token", "backward"),
        ("jit(step)/transpose(jvp(MLLM))/llm/while/body/checkpoint/rematted_computation/x/mul", "llm", "recompute"),
        ("jit(step)/optimizer/mul", "optimizer", "forward"),
        ("jit(step)/add", "other", "forward"),
        ("", "other", "forward"),
    ],
)
def test_components_and_phases_come_from_scopes(path, where, when):
    assert (component(path), phase(path)) == (where, when)


def test_saved_for_the_backward_pass():
    text = """HloModule m
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a = f32[100]{0} broadcast(%p), metadata={op_name="jit(f)/jvp(MLLM)/llm/mul"}
  %b = f32[50]{0} slice(%a), metadata={op_name="jit(f)/jvp(MLLM)/llm/tanh"}
  ROOT %c = f32[8]{0} slice(%a), metadata={op_name="jit(f)/transpose(jvp(MLLM))/llm/mul"}
}
"""
    assert saved_bytes(hlo.parse(text)) == 400  # nothing in the backward pass reads b


@pytest.mark.parametrize(
    "text, message",
    [("v5:4x4", "no chip 'v5'"), ("v5p:4x4", "v5p:4x4x4"), ("v6e:4xx4", "v6e:4x4"), ("v6e", "v6e:4x4")],
)
def test_topology_names(text, message):
    with pytest.raises(ValueError, match=message):
        topology(text)
