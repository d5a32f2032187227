"""Prices of programs whose cost is known, with the real TPU compiler. Skipped if libtpu is not installed."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.conftest import jaxmllm

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='needs the TPU compiler: pip install "jaxmllm[tpu]"'
)

NAMES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def planned(f, *shapes, name="v5p:2x2x1", specs=None, options=None):
    """Timeline of f, compiled for one chip of a topology, or for all of its chips (axis "x") if specs are given."""
    from jaxmllm.plan import hlo
    from jaxmllm.plan.chips import topology
    from jaxmllm.plan.compile import devices_of, prepare
    from jaxmllm.plan.timeline import Timeline
    from jaxmllm.plan.traffic import Network
    from jaxmllm.train.compiler import options as compiler_options

    prepare()
    place = topology(name)
    devices = np.array(devices_of(place)[: None if specs else 1])
    mesh = Mesh(devices, ("x",))
    arguments = [
        jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, spec))
        for (s, d), spec in zip(shapes, specs or [P()] * 9)
    ]
    text = (
        jax.jit(f, compiler_options=compiler_options(mesh) if options is None else options)
        .lower(*arguments)
        .compile()
        .as_text()
    )
    return Timeline(hlo.parse(text), place.chip, Network(place, ("x",), devices))


def cycles(line, **fields) -> float:
    return sum(c.cycles for c in line.charges if all(getattr(c, k) == v for k, v in fields.items()))


@pytest.mark.parametrize("chip", NAMES)
def test_one_matmul_runs_at_70_to_100_percent_of_peak(chip):
    m, k, n = 8192, 4096, 14336
    line = planned(lambda x, y: x @ y, ((m, k), jnp.bfloat16), ((k, n), jnp.bfloat16), name=NAMES[chip])
    assert 0.7 < 2 * m * k * n / line.chip.flops_per_cycle / cycles(line) < 1


def test_a_scan_of_k_layers_costs_k_times_one():
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    def cost(k):
        return cycles(planned(layers, ((4096, 4096), jnp.bfloat16), ((k, 4096, 4096), jnp.bfloat16)))

    two, four, eight = cost(2), cost(4), cost(8)
    assert eight - four == pytest.approx(2 * (four - two), rel=1e-3)  # a fixed part and the same cost per layer
    assert eight == pytest.approx(4 * two, rel=0.1)


def test_a_windowed_collective_matmul_costs_the_matmul():
    """The weight is split over 16 chips; the compiler may gather it first, or in a loop of partial matmuls."""
    m, k, n = 8192, 4096, 14336
    shapes, specs = [((16 * m, k), jnp.bfloat16), ((k, n), jnp.bfloat16)], [P("x"), P("x")]
    whole = planned(lambda x, w: x @ w, *shapes, name="v5p:2x2x4", specs=specs)
    window = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "0"}
    parts = planned(lambda x, w: x @ w, *shapes, name="v5p:2x2x4", specs=specs, options=window)
    assert {c.transfer.opcode for c in whole.charges if c.transfer} == {"all-gather"}
    assert {c.transfer.opcode for c in parts.charges if c.transfer} == {"collective-permute"}
    ideal = 2 * m * k * n / whole.chip.flops
    for line in (whole, parts):
        assert ideal < line.seconds < 1.5 * ideal
    # The loop hides the transfer of all parts except the first; the whole of the gather is waited for.
    exposed = [sum(c.exposed for c in line.charges) for line in (parts, whole)]
    part = k * n * 2 / 16 / whole.chip.link_rate
    assert exposed[0] == pytest.approx(part, rel=0.05) and exposed[1] > 2 * part


def test_a_gather_costs_its_rows():
    line = planned(lambda t, i: t[i], ((32000, 4096), jnp.bfloat16), ((8192,), jnp.int32))
    assert cycles(line, model="gather") == 8192 * 64
    wide = planned(lambda t, i: t[i], ((320, 2**20), jnp.bfloat16), ((64,), jnp.int32))
    assert cycles(wide, kind="gather") >= 0.9 * 64 * 2**21 / wide.chip.hbm_per_cycle  # here the bytes count


@pytest.mark.parametrize("chip", NAMES)
def test_passes_left_out_of_a_plan_change_no_estimate(chip):
    from jaxmllm.plan.compile import ESTIMATES_ONLY

    def loss(w, x):
        def layer(x, w):
            return jax.nn.gelu(x @ w) / jnp.linalg.norm(x, axis=-1, keepdims=True), None

        return jax.lax.scan(layer, x, w)[0].astype(jnp.float32).sum()

    shapes = ((3, 2048, 2048), jnp.bfloat16), ((4096, 2048), jnp.bfloat16)
    whole, part = (planned(jax.grad(loss), *shapes, name=NAMES[chip], options=o) for o in ({}, ESTIMATES_ONLY))
    charged = [[(c.kind, c.cycles, c.times) for c in line.charges] for line in (whole, part)]
    assert len(charged[0]) > 10 and charged[0] == charged[1]


@pytest.mark.long
def test_plan_prints_and_writes_every_figure(tmp_path):
    args = ("plan", "configs/toy.py:tiny", "--topology", "v5p:2x2x1", "--stage", "instruct")
    done = jaxmllm(*args, "--json", tmp_path / "plan.json", env={"XLA_FLAGS": ""})
    found = json.loads((tmp_path / "plan.json").read_text())
    wanted = {
        "fits", "hbm_bytes", "hbm_limit_bytes", "model_flops", "cycles", "cycles_by_component", "unpriced",
        "collective_bytes", "exposed_collective_seconds", "predicted_step_seconds", "predicted_mfu",
        "tokens_per_second_per_chip", "images_per_second_per_chip", "compile_seconds", "chip_hours",
    }  # fmt: skip
    assert found["fits"] and all(found[key] is not None for key in wanted)
    components = {"encoder_clip", "encoder_dino", "fuser_clip", "aggregator", "llm", "llm_insert", "next_token", "head"}
    assert components | {"objective_depth", "objective_seg", "optimizer"} <= set(found["cycles_by_component"])
    assert "fits" in done.stdout and "MFU" in done.stdout
    same = jaxmllm(*args, "--compare", tmp_path / "plan.json", env={"XLA_FLAGS": ""})
    assert "+0.0%" in same.stdout


@pytest.mark.long
def test_long_rows_have_no_array_of_scores():
    from jaxmllm import recipes
    from jaxmllm.plan import compile as compiling
    from jaxmllm.plan import hlo
    from jaxmllm.plan.chips import topology

    compiling.prepare()
    s = 1024
    sizes = {"width": 512, "layers": 2, "kv_heads": 2, "heads": 4, "head_dim": 128, "mlp": 768, "vocab": 1280}
    overrides = [*(f"model.llm.{k}={v}" for k, v in sizes.items()), f"data.seq_len={s}", "stages.text.rows=8"]
    run = recipes.override(recipes.load("configs/llama3_8b.py"), overrides)
    program = compiling.compile_stage(run, run.stages[0], topology("v5p:2x2x1"), print)
    instructions = [i for part in hlo.parse(program.text).computations.values() for i in part.values()]
    assert {i.name.split("_")[0] for i in instructions if "_flash_" in i.name} == {"forward", "backward"}
    scores = [i for i in instructions for array in i.arrays if array.dtype == "f32" and array.dims.count(s) > 1]
    assert not scores
