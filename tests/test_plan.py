"""The planner's parts that need no TPU compiler: reading stored programs, pricing them, counting FLOPs.

tests/hlo/ holds what the TPU compiler (libtpu 0.0.42) made for one or a few v5p chips: scan.txt, five layers of
tanh(x @ w) with 512 x 512 weights; rows.txt, a gather and a scatter of 1024 rows of 256 bfloat16, and a sort;
sharded.txt, the gradient of a two-layer MLP on fsdp 2 x tensor 2; windowed.txt, a matmul of 16 chips whose weight is
gathered by parts beside it.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxmllm import config as configs
from jaxmllm import mesh
from jaxmllm.plan import flops, hlo, report
from jaxmllm.plan.chips import CHIPS, topology
from jaxmllm.plan.kernels import FLASH, SAMPLING, SPLASH
from jaxmllm.plan.timeline import Timeline, phase, saved_bytes, stage
from jaxmllm.plan.traffic import Network, first_group
from jaxmllm.train.checkpoint import abstract_on
from jaxmllm.train.setup import abstract_batch, stage_program
from tests.conftest import ROOT

V5P = CHIPS["v5p"]


def network(shape, axes, torus="v5p:2x2x1", slices=1) -> Network:
    """Devices of a torus in row-major order, laid out as a mesh."""
    place = topology(torus, slices)
    grid = list(np.ndindex(*place.shape)) * slices
    size = len(grid) // slices
    devices = [SimpleNamespace(coords=c, core_on_chip=0, slice_index=i // size) for i, c in enumerate(grid)]
    array = np.empty(shape, object)
    array.reshape(-1)[:] = devices[: array.size]
    return Network(place, axes, array)


def timeline(name: str, shape=(1,), axes=("fsdp",), torus="v5p:2x2x1") -> Timeline:
    module = hlo.parse((ROOT / "tests" / "hlo" / f"{name}.txt").read_text())
    return Timeline(module, topology(torus).chip, network(shape, axes, torus))


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


def test_a_branch_costs_its_share():
    def calls(scope):
        module = hlo.parse(BRANCHES.replace("SCOPE", scope))
        computation = module.computations[module.entry]
        return module.calls(computation["c"], computation)

    assert calls("insert/10_of_32") == [("yes", 10 / 32), ("no", 22 / 32)]
    assert calls("insert") == [("yes", 1)]


def test_rows_and_sorts_are_priced_and_listed():
    charges = [c for c in timeline("rows").charges if c.model in ("gather", "sort")]
    prices = sorted(c.cycles for c in charges if c.model == "gather")
    assert prices == [1024 * 64, 2 * 1024 * 64]  # a row of 512 bytes is below the price of its transfer
    assert any(c.model == "sort" for c in charges)
    assert all(c.model in report.MODELS for c in charges)


def test_collectives_name_their_axis_and_bytes():
    line = timeline("sharded", (2, 2), ("fsdp", "tensor"))
    moved = {c.name: c.transfer for c in line.charges if c.transfer}
    assert {t.axes for t in moved.values()} == {"fsdp"}
    gather = next(t for t in moved.values() if t.opcode == "all-gather")
    full = 1024 * 2048 * 2
    assert gather.bytes == full / 2
    # Two chips that are neighbours in a dimension of length 2, which does not wrap: one link.
    assert gather.ici == pytest.approx(full / 2 / V5P.link_rate + 1e-6)
    reduce = next(t for t in moved.values() if t.opcode == "all-reduce")
    assert reduce.bytes == 2 * full  # both gradients; half of them through the links, twice
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
    each = one_line("all-reduce", "f32[1000000]{0}", "replica_groups={{0,1,2,3,4,5,6,7}}")
    transfer = two.transfer("all-reduce", each)
    assert transfer.axes == "slice+fsdp" and transfer.ici > 0
    assert transfer.dcn == pytest.approx(2 * 4e6 / 4 / 2 / V5P.dcn_rate)  # every chip carries its quarter across


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


def test_asynchronous_collectives_hide_behind_what_runs_meanwhile():
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


@pytest.mark.parametrize(
    "kernel, note, result, per_score",
    [
        ("fwd", "block_q: 512, block_kv: 1024, block_q_dkv: 512", "bf16[4,32,2048,128]", "fwd"),
        ("dkv", "block_q_dkv: 512, block_kv_dkv: 1024", "bf16[4,32,1024,128]", "dkv"),
    ],
)
def test_splash_attention_is_priced_by_the_blocks_it_visits(kernel, note, result, per_score):
    shapes = [("m", "s8[1,4,2]"), ("q", "bf16[4,32,2048,128]"), ("k", "bf16[4,32,2048,128]")]
    lines = [f"  %{name} = {shape}{{3,2,1,0}} parameter({i})" for i, (name, shape) in enumerate(shapes)]
    # Attributes of a kernel hold line breaks.
    call = (
        f"  ROOT %splash_mqa_{kernel}.1 = {result}{{3,2,1,0}} custom-call(%m, %q, %k), "
        f'custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{\n{note}\n'
        '}}, metadata={op_name="jit(f)/SCOPE/pallas_call"}'
    )
    # Queries in four blocks, keys in two: the first two blocks of queries see one block of keys.
    for scope, blocks in (("full", 8), ("causal", 6)):
        body = "\n".join(["ENTRY %e (m: s8[1,4,2]) -> bf16[] {", *lines, call.replace("SCOPE", scope), "}"])
        (charge,) = Timeline(hlo.parse(body), V5P, network((1,), ("fsdp",))).charges
        assert charge.model == "our kernel"
        expected = 4 * 32 * blocks * 512 * 1024 * SPLASH["v5p", 128][per_score] / 2  # two cores
        assert charge.cycles == pytest.approx(expected)


def test_flash_attention_is_priced_by_what_its_queries_see():
    shapes = {"m": "s32[40]", "a": "s32[2,1,2048]", "b": "s32[2,1,4096]", "q": "bf16[2,8,4,2048,128]"}
    shapes["k"] = "bf16[2,8,4096,128]"
    lines = [f"  %{name} = {shape} parameter({i})" for i, (name, shape) in enumerate(shapes.items())]
    call = (
        "  ROOT %backward_flash_1024x1024.1 = bf16[2,8,4,2048,128] custom-call(%m, %a, %b, %q, %k, %k), "
        'custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/SCOPE/pallas_call"}'
    )
    *of_scores, of_query, of_key = FLASH["v5p", 128]["backward"]
    moved = 4 * 2 * 8 * 4096 * 128 * 2 / V5P.hbm_per_cycle  # k, v and their gradients
    # The last half of causal rows: two blocks see two and three blocks whole, and one on the diagonal each. Full rows:
    # four blocks, the last with a mask, since the kernel has segments.
    for scope, blocks in (("causal", (5, 2, 0)), ("full", (6, 0, 2))):
        body = "\n".join(["ENTRY %e (m: s32[40]) -> bf16[] {", *lines, call.replace("SCOPE", scope), "}"])
        (charge,) = Timeline(hlo.parse(body), V5P, network((1,), ("fsdp",))).charges
        cycles = 64 * (1024**2 * np.dot(blocks, of_scores) + 2048 * of_query) + 16 * 4096 * of_key
        assert charge.model == "our kernel" and charge.cycles == pytest.approx(cycles / 2 + moved)  # two cores


def test_sampling_is_priced_by_pixels_and_queries():
    """Of 600 queries 640 are worked on."""
    shapes = {"maps": "bf16[3,8,576,1024]", "at": "f32[8,16,3,12,600]", "g": "bf16[8,600,1024]"}
    lines = [f"  %{name} = {shape} parameter({i})" for i, (name, shape) in enumerate(shapes.items())]
    call = (
        "  ROOT %backward_sampling.3 = (bf16[3,8,576,1024], f32[8,16,3,12,600]) custom-call(%maps, %at, %g), "
        'custom_call_target="tpu_custom_call"'
    )
    body = "\n".join(["ENTRY %e (m: bf16[3]) -> bf16[] {", *lines, call, "}"])
    (charge,) = Timeline(hlo.parse(body), V5P, network((1,), ("fsdp",))).charges
    pixel, level, query = SAMPLING["v5p"]["backward"]
    cycles = 8 * 16 * 640 * (3 * (576 * pixel + level) + query) / 2  # two cores
    moved = 2 * 3 * 8 * 576 * 1024 * 2 / V5P.hbm_per_cycle
    assert charge.model == "our kernel" and charge.cycles == pytest.approx(cycles + moved)


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
def test_stages_come_from_scopes(path, where, when):
    assert (stage(path), phase(path)) == (where, when)


def test_saved_for_the_backward_pass():
    text = """HloModule m
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a = f32[100]{0} broadcast(%p), metadata={op_name="jit(f)/jvp(MLLM)/llm/mul"}
  %b = f32[50]{0} slice(%a), metadata={op_name="jit(f)/jvp(MLLM)/llm/tanh"}
  ROOT %c = f32[8]{0} slice(%a), metadata={op_name="jit(f)/transpose(jvp(MLLM))/llm/mul"}
}
"""
    assert saved_bytes(hlo.parse(text)) == 400  # b is read by nothing of the backward pass


def traced(f, *shapes, trained):
    found = flops.Counter()
    closed = jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    flops.count(closed.jaxpr, trained, 1, "jit(f)", found)
    return sum(found.values())


def test_flops_count_what_training_needs():
    mlp = lambda x, u, v: jnp.tanh(x @ u) @ v
    shapes, one = ((8, 16), (16, 32), (32, 4)), 2 * 8 * 32 * np.array([16, 4])
    assert traced(mlp, *shapes, trained=[False, False, False]) == one.sum()
    assert traced(mlp, *shapes, trained=[False, True, True]) == 2 * one[0] + 3 * one[1]  # x needs no gradient
    assert traced(mlp, *shapes, trained=[False, False, True]) == one[0] + 2 * one[1]
    assert traced(jax.checkpoint(mlp), *shapes, trained=[True] * 3) == 3 * one.sum()

    def layers(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    # The first turn's x needs no gradient, but a loop is one program: its carry depends from the second turn on.
    assert traced(layers, (8, 16), (5, 16, 16), trained=[False, True]) == 5 * 3 * 2 * 8 * 16 * 16

    def scoped(x, y):
        with jax.named_scope("causal"):
            z = x @ y
        with jax.named_scope("gather"):
            return z @ y

    assert traced(scoped, (8, 8), (8, 8), trained=[False, False]) == 8**3

    def seldom(x, y):
        with jax.named_scope("1_of_4"):
            return jax.lax.cond(x[0, 0] > 0, lambda: x @ y, lambda: x)

    assert traced(seldom, (8, 8), (8, 8), trained=[False, False]) == 2 * 8**3 / 4


def test_flops_of_the_8b_recipe():
    """6 FLOPs a parameter and token of all matrices but the embedding, and the causal triangle of attention."""
    run = configs.load("configs/llama3_8b.py")
    found = flops.model_flops(run, run.stages[0])
    tokens, layer = 256 * 2048, 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336)
    assert found["head"] == 6 * tokens * 4096 * 128256
    assert found["llm"] == 6 * tokens * 32 * layer + 32 * 12 * tokens * 2048 * 4096 / 2


@pytest.mark.parametrize(
    "text, message",
    [("v5:4x4", "no chip 'v5'"), ("v5p:4x4", "v5p:4x4x4"), ("v6e:4xx4", "v6e:4x4"), ("v6e", "v6e:4x4")],
)
def test_topology_names(text, message):
    with pytest.raises(ValueError, match=message):
        topology(text)


# 64 x 4 and 256 x 8 chips. The toy has too few heads to split; 1152, SigLIP's width, is no multiple of 256.
TOY = {"data": 64, "fsdp": 4}, {"data": 256, "fsdp": 8}
LARGE = {"fsdp": 64, "tensor": 4}, {"fsdp": 256, "tensor": 8}
MESHES = {"toy.py": TOY, "cambrian_8b.py:published": (LARGE[0], {"data": 4, "fsdp": 64, "tensor": 8})}
CONFIGS = sorted({path.name for path in (ROOT / "configs").glob("*.py")} | set(MESHES))
PODS = [
    pytest.param(name, sizes, id=f"{name}-{'x'.join(map(str, sizes.values()))}")
    for name in CONFIGS
    for sizes in MESHES.get(name, LARGE)
]


@pytest.mark.parametrize("name, sizes", PODS)
def test_every_config_lowers_on_a_pod(name, sizes):
    run = configs.load(str(ROOT / "configs" / name))
    sizes = mesh.Mesh(**{"fsdp": 1, **sizes})
    pod = AbstractMesh(
        tuple(getattr(sizes, axis) for axis in mesh.AXES), mesh.AXES, axis_types=(AxisType.Explicit,) * len(mesh.AXES)
    )
    each = run.stages[-1]
    each = dataclasses.replace(each, rows=mesh.data_shards(pod) * each.accumulate)
    with jax.sharding.use_abstract_mesh(pod):
        params, fresh, step = stage_program(run, each, pod)
        state = abstract_on(pod, jax.eval_shape(fresh, params))
        text = step.trace(state, abstract_batch(run, each, pod)).lower(lowering_platforms=("tpu",)).as_text()
    assert "sdy.mesh" in text or "mhlo.sharding" in text
