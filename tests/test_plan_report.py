"""What a plan says: its text, the nearest setting that fits, and the errors that prevent a plan."""

import importlib.util
import json
from types import SimpleNamespace

import jax
import pytest

from jaxmllm import recipes
from jaxmllm.cli.main import main
from jaxmllm.plan import compile as compiling
from jaxmllm.plan import report
from jaxmllm.plan.chips import topology
from tests.plan_case import mesh_devices, stored


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else found(name, *a))
    assert main(["plan", "configs/llama3_8b.py", "--topology", "v5p:4x4x4"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "pip install" in error and "[tpu]" in error


def test_memory_messages():
    used = "Ran out of memory in memory space hbm. Used 43.20G of 31.25G hbm. Exceeded hbm capacity by 11.95G."
    assert compiling.parse_memory_error(used, 7) == (int(43.2 * 2**30), int(31.25 * 2**30))
    temporaries = "the total memory required for HLO temporaries (256.00G) exceeds available HBM (30.75G)."
    assert compiling.parse_memory_error(temporaries, 7) == (256 * 2**30 + 7, int(30.75 * 2**30))
    with pytest.raises(RuntimeError, match="something else"):
        compiling.parse_memory_error("something else", 0)


@pytest.mark.parametrize("error, tries", [(None, 1), ("E1001: CompileTimeScopedVmemOom", 2), ("E1000: no HBM", 1)])
def test_all_passes_run_where_a_kernel_needs_them(error, tries):
    calls, said = [], []

    def compiled(options=None):
        calls.append(options)
        if options and error:
            raise jax.errors.JaxRuntimeError(error)
        return "program"

    lowered = SimpleNamespace(compile=compiled)
    if error and tries == 1:
        with pytest.raises(jax.errors.JaxRuntimeError, match="no HBM"):
            compiling.compile_for_estimates(lowered, said.append)
    else:
        assert compiling.compile_for_estimates(lowered, said.append) == "program"
    assert calls == [compiling.ESTIMATES_ONLY, None][:tries] and len(said) == tries - 1


@pytest.mark.parametrize("rows_that_fit, overrides", [(4, "accumulate=4"), (1, "mesh.tensor=2"), (0, None)])
def test_nearest_setting_that_fits(monkeypatch, rows_that_fit, overrides):
    """A program fits if a micro-batch has at most `rows_that_fit` rows per chip. It has 16 at first, at least one."""
    run = recipes.override(recipes.load("configs/llama3_8b.py"), ["stages.text.rows=1024"])
    place = topology("v5p:4x4x4")
    memory = {"limit": 90, "trainable": 10, "frozen": 0, "optimizer": 20, "batch": 0}

    def compiled(run, stage, place, say=None):
        rows = stage.rows / stage.accumulate / 64
        fits = rows <= rows_that_fit if rows_that_fit != 1 else run.mesh.tensor == 2
        total = 50 if fits else 200
        return compiling.Program("", compiling.HbmUse(total, **memory, scratch=total - 30), None, 0.0)

    monkeypatch.setattr(report, "compile_stage", compiled)
    found = report.nearest_that_fits(run, run.stages[0], place, compiled(run, run.stages[0], place), lambda text: None)
    assert (overrides in found) if overrides else found is None


@pytest.mark.parametrize("name", ["sharded", "rows"])  # one waits for collectives, the other has gathers to price
def test_a_plan_as_text(monkeypatch, name):
    """It names every component with a share that matters, and no others."""
    devices = mesh_devices((1, 1, 2, 2, 1))
    memory = compiling.HbmUse(4 * 2**30, 90 * 2**30, 2**30, 0, 2**30, 0, 2 * 2**30)
    monkeypatch.setattr(report, "devices_of", lambda _: jax.devices())
    monkeypatch.setattr(report, "compile_stage", lambda *_: compiling.Program(stored(name), memory, devices, 7.0))
    monkeypatch.setattr(report, "model_flops", lambda *_: {"llm": 1e12})
    plan = report.plan(recipes.load("configs/llama3_8b.py"), topology("v5p:2x2x1"), say=lambda text: None)
    found = plan["stages"]["text"]
    cycles, waits, unpriced = (
        found[key] for key in ("cycles_by_component", "exposed_seconds_by_component", "unpriced")
    )
    assert sum(waits.values()) == pytest.approx(found["exposed_collective_seconds"])
    assert waits if name == "sharded" else unpriced
    wanted = [f"{component} {c / found['cycles']:.1%}" for component, c in cycles.items()]
    wanted += [f"{component} {seconds * 1e3:.1f} ms" for component, seconds in waits.items()]
    wanted += [f"{use['component']} {use['cycles']:.2e}" for use in unpriced]
    crumb = found["cycles"] * 1e-4
    cycles["crumb"], waits["crumb"] = crumb, found["predicted_step_seconds"] * 1e-4
    unpriced += [{**use, "component": "crumb", "cycles": crumb} for use in unpriced]
    shown = report.show(plan)
    assert "crumb" not in shown and all(part in shown for part in wanted), shown
    assert "4.0 of 90.0 GiB" in shown and "compiled in 7 s" in shown
    assert all(shown.count(f"({use['rule']})") == 1 for use in unpriced)


def test_a_target_is_a_config_or_an_earlier_plan(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "plan", lambda run, *rest: (run.mesh.slice, run.stages[0].rows, *rest))
    place = topology("v5p:2x2x1", 2)
    planned = report.load_or_plan("configs/llama3_8b.py", ["stages.text.rows=8"], place, "text", print)
    assert planned == (2, 8, place, "text", print)
    path = tmp_path / "plan.json"
    for earlier in ({"cycles_by_component": {"llm": 1.0}}, {"cycles": 1.0}, []):
        path.write_text(json.dumps(earlier))
        if "cycles_by_component" in earlier:
            assert report.load_or_plan(str(path), [], place, None, print) == earlier
        else:
            with pytest.raises(recipes.ConfigError, match="is not a plan"):
                report.load_or_plan(str(path), [], place, None, print)
