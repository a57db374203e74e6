"""`--compile-for`: what a compiled step's report says, what it refuses, and the real TPU compiler where it is there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from eight_devices import ROOT, on_eight_devices
from oracle import error_of

from train.__main__ import main
from train.compile_for import StepReport, devices_for
from train.hlo import collectives, estimated_cycles

MESH = {"data": 4, "model": 2, "sweep": 1}
needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler, libtpu")


def program(*instructions: str) -> str:
    """Return the text of a compiled program."""
    return "\n".join(("ENTRY %main (a: f32[2]) -> f32[2] {", *(f"  {one}" for one in instructions), "}"))


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        # device 2 d + m is at data=d, model=m
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", ("data",)),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("model",)),
        ("replica_groups={}", ("data", "model")),
        ("replica_groups=[1,8]<=[8]", ("data", "model")),
        ("replica_groups=[4,2]<=[8]", ("model",)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data",)),
        ("replica_groups=mesh['data'=4,'model'=2,'sweep'=1] {'data'}", ("data",)),
        ("replica_groups=mesh['data'=4,'model'=2,'sweep'=1] {'data','model'}", ("data", "model")),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", ("data",)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", ("model",)),
        ("source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}", ("model",)),
    ],
)
def test_the_axes_of_a_collective_are_those_along_which_its_devices_differ(groups: str, axes: tuple[str, ...]) -> None:
    text = program(f"%r = f32[2]{{0}} all-reduce(%a), channel_id=1, {groups}, use_global_device_ids=true")
    assert [one.axes for one in collectives(text, MESH)] == [axes]


def test_groups_in_an_unknown_form_are_an_error_rather_than_a_guess() -> None:
    text = program("%r = f32[2]{0} all-reduce(%a), replica_groups=something_new{1}")
    with pytest.raises(ValueError, match=r"cannot read.*something_new"):
        collectives(text, MESH)


def test_a_collective_counts_its_results_and_once_for_each_channel() -> None:
    groups = "replica_groups={{0,1},{2,3},{4,5},{6,7}}"
    text = program(
        f"%g = (f32[4]{{0:T(8,128)}}, bf16[8]{{0}}, f32[8]{{0}}, bf16[16]{{0}}) all-gather-start(%a, %b), "
        f"channel_id=1, {groups}",
        "%d = (f32[8]{0}, bf16[16]{0}) all-gather-done(%g)",
        "%p = (s4[6]{0}, s4[6]{0}, u32[], u32[]) collective-permute-start(%c), channel_id=2, "
        "source_target_pairs={{0,1},{1,0}}",
        f"%again = pred[3,2]{{1,0}} all-to-all(%e), channel_id=3, {groups}",
        f"%twice = pred[3,2]{{1,0}} all-to-all(%e), channel_id=3, {groups}",
    )
    found = {one.kind: one for one in collectives(text, MESH)}
    assert {kind: one.bytes for kind, one in found.items()} == {
        "all-gather": 8 * 4 + 16 * 2,
        "collective-permute": 6 // 2,
        "all-to-all": 6,
    }
    assert [str(array) for array in found["all-gather"].arrays] == ["f32[8]", "bf16[16]"]


def test_the_estimate_counts_a_loop_once_for_each_trip_and_leaves_out_what_has_none() -> None:
    text = """
%body (s: (s32[], f32[2])) -> (s32[], f32[2]) {
  %s = (s32[], f32[2]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[2]{0} get-tuple-element(%s), index=1
  %y = f32[2]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
  ROOT %after = (s32[], f32[2]{0}) tuple(%next, %y)
}
%condition (c: (s32[], f32[2])) -> pred[] {
  %c = (s32[], f32[2]{0}) parameter(0)
  %ten = s32[] constant(10)
  %count = s32[] get-tuple-element(%c), index=0
  ROOT %test = pred[] compare(%count, %ten), direction=LT
}
%fused (f: f32[2]) -> f32[2] {
  ROOT %f = f32[2]{0} parameter(0)
}
ENTRY %main (a: (s32[], f32[2])) -> (s32[], f32[2]) {
  %a = (s32[], f32[2]{0}) parameter(0)
  %lookup = f32[2]{0} fusion(%a), kind=kCustom, calls=%fused, backend_config={"estimated_cycles":"9223372036854775807"}
  %loop = (s32[], f32[2]{0}) while(%a), condition=%condition, body=%bodyKNOWN
  ROOT %end = (s32[], f32[2]{0}) fusion(%loop), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"7"}
}
"""
    assert estimated_cycles(text.replace("KNOWN", "")) == 5 * 100 + 7
    known = ', backend_config={"known_trip_count":{"n":"3"}}'
    assert estimated_cycles(text.replace("KNOWN", known)) == 3 * 100 + 7
    assert estimated_cycles(program("%b = f32[2]{0} add(%a, %a)")) is None


COMPILED = """
import json
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from tinymodel_jax.training.sharding import make_mesh
from train.compile_for import report_step

mesh = make_mesh("data=4,model=2")
on = lambda *spec: NamedSharding(mesh, P(*spec))

def step(total, x, w):
    def add(carry, _):
        return jnp.tanh(x @ carry).T @ x, None  # summed over the rows, so over data
    total, _ = jax.lax.scan(add, total, None, length=3)
    return total, jax.lax.with_sharding_constraint(w, on())

step = jax.jit(step, donate_argnums=0, out_shardings=(on(), on()))
make = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=on(*spec))
arguments = make((16, 16)), make((64, 16), "data"), make((10, 6), None, "model")
report = report_step(step, arguments, mesh, 8e9)
found = [(one.kind, one.axes, one.times, [str(array) for array in one.arrays]) for one in report.collectives]
print(json.dumps({
    "collectives": found, "arguments": report.argument_bytes, "outputs": report.output_bytes, "flops": report.flops,
    "peak": report.peak_bytes, "temporaries": report.temporary_bytes, "compiled_flops": report.compiled_flops,
    "program": report.program_bytes, "seconds": report.estimated_seconds, "share": report.share_of_peak,
}))
"""


def test_the_report_of_a_compiled_step_says_what_each_device_holds_and_exchanges() -> None:
    found = on_eight_devices(COMPILED)
    # `total` whole, a quarter of `x`, half of `w`; of the results, only `w` does not go where an argument was
    assert found["arguments"] == 4 * (16 * 16 + 64 * 16 // 4 + 10 * 6 // 2)
    assert 4 * 10 * 6 <= found["outputs"] < 4 * 10 * 6 + 100, "the rest is the table of the results' addresses"
    assert found["peak"] == sum(found[part] for part in ("arguments", "outputs", "temporaries", "program"))
    assert found["flops"] == 1e9
    assert found["compiled_flops"] > 0
    assert found["seconds"] is found["share"] is None, "no estimate for a CPU"
    exchanged = {(kind, *axes): (times, arrays) for kind, axes, times, arrays in found["collectives"]}
    assert exchanged["all-reduce", "data"] == (3, ["f32[16,16]"])
    assert exchanged["all-gather", "model"][1] == ["f32[10,6]"]
    assert len(exchanged) == 2


def test_the_share_of_the_peak_is_of_the_arithmetic_asked_for() -> None:
    report = StepReport(
        chips=8,
        device_kind="TPU v5 lite",
        argument_bytes=1,
        output_bytes=20,
        temporary_bytes=300,
        program_bytes=4000,
        hbm_bytes=16 * 10**9,
        compiled_flops=9e12,
        flops=4e12,
        peak_flops=200e12,
        estimated_seconds=0.04,
        collectives=(),
    )
    assert report.share_of_peak == pytest.approx(0.5)
    assert report.peak_bytes == 4321


def test_an_unknown_slice_is_an_error_that_says_what_there_is() -> None:
    message = error_of(lambda: devices_for("h100:8"))
    assert "'h100:8'" in message
    assert "v5e, v6e, v5p" in message
    assert "v5e:2x4" in message


def test_a_missing_compiler_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "tinymodel-jax[tpu]" in error_of(lambda: devices_for("v5e:2x4"), ModuleNotFoundError)


def test_a_run_needs_data_and_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lm", "--preset", "smoke"]) == 1
    error = capsys.readouterr().err
    assert "--data" in error
    assert "--out" in error


def compile_for(slice_name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m train lm --compile-for` in a separate process, because the compiler stays loaded."""
    command = [sys.executable, "-m", "train", "lm", "--preset", "smoke", "--compile-for", slice_name, *options]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@needs_compiler
def test_the_tpu_compiler_takes_the_language_models_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = compile_for("v5e:2x4", "--mesh", "data=4,model=2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "8 x TPU v5 lite, data=4, model=2" in done.stdout
    lines = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if line.startswith("│")}
    assert "of 16 GB" in lines["memory in all"]
    assert "ms" in lines["estimated time, without collectives"]
    assert "%" in lines["share of the bfloat16 peak at that"]
    assert "all-reduce" in lines
    assert "all-gather" not in lines
    assert not out.exists()


@pytest.mark.slow
@needs_compiler
def test_what_the_tpu_compiler_cannot_do_is_one_line() -> None:
    done = compile_for("v5e:9x9")
    assert done.returncode == 1
    assert done.stderr.startswith("train: --compile-for 'v5e:9x9': this slice does not exist")
    assert len(done.stderr.splitlines()) == 1
    done = compile_for("v5e:2x2", "--batch-size", "33554432")
    assert done.returncode == 1
    assert done.stderr.startswith("train: the step does not fit these chips")
    assert len(done.stderr.splitlines()) == 1
