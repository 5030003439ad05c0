"""The GEMMs and quantisers compile for every GPU we name, use its matrix instructions, and spill nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("crosscompile.py")
ROOT = SCRIPT.parents[2]
MAX_TENSOR_MEMORY = 512
MAX_STACK = 8  # two registers, once a tile, which Triton 3.9 lacks in the precise FP8 GEMM and 3.6 does not
SHARED_BYTES = {"80": 166912, "86": 101376, "89": 101376, "90": 232448, "100": 232448, "103": 232448, "120": 101376}
MAIN_LOOP = {
    ("packed", "80"): "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    ("packed", "90"): "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16",
    ("packed", "100"): "tcgen05.mma.cta_group::1.kind::f16",
    ("native", "100"): "tcgen05.mma.cta_group::1.kind::mxf4.block_scale",
    ("native", "103"): "tcgen05.mma.cta_group::1.kind::mxf4.block_scale",
    ("native", "120"): "kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0",
    ("native", "121"): "kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0",
    ("native", "gfx950"): "v_mfma_scale_f32_32x32x64_f8f6f4",
    ("fp8_fast", "90"): "wgmma.mma_async.sync.aligned.m64n256k32.f32.e5m2.e5m2",
    ("fp8_precise", "90"): "wgmma.mma_async.sync.aligned.m64n128k32.f32.e5m2.e5m2",
    ("fp8_pointer", "89"): "mma.sync.aligned.m16n8k32.row.col.f32.e5m2.e5m2.f32",
    ("fp8_pointer", "90"): "wgmma.mma_async.sync.aligned.m64n128k32.f32.e5m2.e5m2",
}

QUANTISERS = {"quantize_rows", "quantize_columns", "requantize"}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """What each kernel became. A process of its own: here the interpreter may have replaced triton.jit."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen([sys.executable, str(SCRIPT), *makers], env=environment, stdout=-1, stderr=-1, text=True)
        for makers in ([], ["--amd"])
    ]
    found = []
    for process in processes:
        output, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors[-3000:]
        found += [json.loads(line) for line in output.splitlines()]
    return found


def test_native_instructions(rows: list[dict]) -> None:
    assert {row["kernel"] for row in rows} == {kernel for kernel, _ in MAIN_LOOP} | QUANTISERS
    for row in rows:
        wanted = MAIN_LOOP.get((row["kernel"], row["arch"]))
        if wanted:
            assert any(wanted in name for name in row["instructions"]), row
        if row["kernel"] == "native" and row["epilogue"] == "forward":  # a rotation multiplies in bf16
            assert all("mxf4" in name or "scale" in name for name in row["instructions"]), row


def test_resources(rows: list[dict]) -> None:
    for row in rows:
        assert row["stack"] <= MAX_STACK, row
        assert row["registers"] <= (512 if row["arch"].startswith("gfx") else 255), row
        assert row["tensor_memory"] <= MAX_TENSOR_MEMORY, row
        assert row["shared"] <= SHARED_BYTES.get(row["arch"], 232448), row


def test_quantisers_compile_for_every_maker(rows: list[dict]) -> None:
    for kernel in QUANTISERS:
        found = {row["arch"]: row for row in rows if row["kernel"] == kernel}
        assert set(found) == {"80", "90", "100", "120", "gfx942", "gfx950"}
        assert all(row["instructions"] for row in found.values()), "the rotation is a matrix product"
