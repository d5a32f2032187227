"""Prices of attention and sampling kernels, which the TPU compiler does not estimate."""

import numpy as np
import pytest

from jaxmllm.plan.kernels import FLASH, SAMPLING, SPLASH
from tests.plan_case import V5P, only_charge


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
    # The attributes of a kernel contain line breaks.
    call = (
        f"  ROOT %splash_mqa_{kernel}.1 = {result}{{3,2,1,0}} custom-call(%m, %q, %k), "
        f'custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{\n{note}\n'
        '}}, metadata={op_name="jit(f)/SCOPE/pallas_call"}'
    )
    # Four blocks of queries, two of keys: the first two blocks of queries see one block of keys. With a window of 512
    # keys the third block of queries still sees keys of the first block; the fourth does from 514 keys on.
    windows = [
        (f"causal/window_{window}_of_2048", blocks) for window, blocks in ((512, 5), (513, 5), (514, 6), (9999, 6))
    ]
    for scope, blocks in (("full", 8), ("causal", 6), *windows):
        body = "\n".join(["ENTRY %e (m: s8[1,4,2]) -> bf16[] {", *lines, call.replace("SCOPE", scope), "}"])
        charge = only_charge(body)
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
    *per_score, per_query, per_key = FLASH["v5p", 128]["backward"]
    moved = 4 * 2 * 8 * 4096 * 128 * 2 / V5P.hbm_per_cycle  # k, v and their gradients
    # Queries are the last half of their rows. If causal, their two blocks see two and three whole blocks of keys, and
    # one on the diagonal each. If not, both see four blocks, the last with a mask, since the kernel has segments.
    for scope, blocks in (("causal", (5, 2, 0)), ("full", (6, 0, 2))):
        body = "\n".join(["ENTRY %e (m: s32[40]) -> bf16[] {", *lines, call.replace("SCOPE", scope), "}"])
        charge = only_charge(body)
        cycles = 64 * (1024**2 * np.dot(blocks, per_score) + 2048 * per_query) + 16 * 4096 * per_key
        assert charge.model == "our kernel" and charge.cycles == pytest.approx(cycles / 2 + moved)  # two cores


def test_sampling_is_priced_by_pixels_and_queries():
    """The kernel works on 640 queries if there are 600."""
    shapes = {"maps": "bf16[3,8,576,1024]", "at": "f32[8,16,3,12,600]", "g": "bf16[8,600,1024]"}
    lines = [f"  %{name} = {shape} parameter({i})" for i, (name, shape) in enumerate(shapes.items())]
    call = (
        "  ROOT %backward_sampling.3 = (bf16[3,8,576,1024], f32[8,16,3,12,600]) custom-call(%maps, %at, %g), "
        'custom_call_target="tpu_custom_call"'
    )
    body = "\n".join(["ENTRY %e (m: bf16[3]) -> bf16[] {", *lines, call, "}"])
    charge = only_charge(body)
    per_pixel, per_level, per_query = SAMPLING["v5p"]["backward"]
    cycles = 8 * 16 * 640 * (3 * (576 * per_pixel + per_level) + per_query) / 2  # two cores
    moved = 2 * 3 * 8 * 576 * 1024 * 2 / V5P.hbm_per_cycle
    assert charge.model == "our kernel" and charge.cycles == pytest.approx(cycles + moved)
