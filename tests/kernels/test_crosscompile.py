"""Every kernel compiles for every GPU we name, uses its matrix instructions, and spills nothing."""

from importlib.metadata import version

import pytest

pytest.importorskip("triton")
import resources

TRITON = tuple(int(part) for part in version("triton").split(".")[:2])
LATEST = {"121"} if TRITON >= (3, 9) else set()
ARCHITECTURES = {"80", "86", "89", "90", "100", "103", "120", "gfx942", "gfx950"} | LATEST
BLACKWELL = {"100", "103", "120"} | LATEST
MAX_TENSOR_MEMORY = 512
SHARED_BYTES = {
    "80": 166912, "86": 101376, "89": 101376, "90": 232448, "100": 232448, "103": 232448, "120": 101376, "121": 101376,
    "gfx942": 65536, "gfx950": 163840,
}  # fmt: skip
MAIN_LOOP = {
    ("packed", "80"): "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    ("packed", "90"): "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16",
    ("packed", "100"): "tcgen05.mma.cta_group::1.kind::f16",
    ("native_mxfp4", "100"): "tcgen05.mma.cta_group::1.kind::mxf4.block_scale",
    ("native_mxfp4", "103"): "tcgen05.mma.cta_group::1.kind::mxf4.block_scale",
    ("native_mxfp4", "120"): "kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0",
    ("native_mxfp4", "121"): "kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0",
    ("native_mxfp4", "gfx950"): "v_mfma_scale_f32_32x32x64_f8f6f4",
    ("native_mxfp8", "100"): "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale",
    ("native_mxfp8", "103"): "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale",
    ("native_mxfp8", "120"): "kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3.f32.ue8m0",
    ("native_mxfp8", "121"): "kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3.f32.ue8m0",
    ("native_mxfp8", "gfx950"): "v_mfma_scale_f32_32x32x64_f8f6f4",
    ("fp8_fast", "90"): "wgmma.mma_async.sync.aligned.m64n256k32.f32.e5m2.e5m2",
    ("fp8_precise", "90"): "wgmma.mma_async.sync.aligned.m64n128k32.f32.e5m2.e5m2",
    ("fp8_pointer", "89"): "mma.sync.aligned.m16n8k32.row.col.f32.e5m2.e5m2.f32",
    ("fp8_pointer", "90"): "wgmma.mma_async.sync.aligned.m64n128k32.f32.e5m2.e5m2",
}
for arch in ("80", "90", "100", "120"):
    MAIN_LOOP["decode", arch] = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
QUANTISERS = {"quantize_forward", "quantize_rows", "quantize_columns", "requantize"}
EVERYWHERE = {"packed", "mxfp8_rows", "mxfp8_columns", "mxfp8_packed", "unrotate", "dequantize"} | QUANTISERS


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return resources.collect()


def test_every_kernel_compiles_for_every_gpu_that_may_run_it(rows: list[dict]) -> None:
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row["kernel"], set()).add(row["arch"])
    expected = dict.fromkeys(EVERYWHERE, ARCHITECTURES)
    expected |= {kernel: BLACKWELL | {"gfx950"} for kernel in ("native_mxfp4", "native_mxfp8")}
    expected |= {"fp8_fast": {"90"}, "fp8_precise": {"90"}, "fp8_pointer": {"89", "90"}, "expand": {"89", "90"}}
    for rounding in ("", ", stochastic"):
        expected |= {f"requantize fp8{rounding}{check}": {"89", "90"} for check in ("", ", checking")}
    expected["decode"] = {arch for arch in ARCHITECTURES if not arch.startswith("gfx")}
    assert found == expected


def test_native_instructions(rows: list[dict]) -> None:
    for row in rows:
        wanted = MAIN_LOOP.get((row["kernel"], row["arch"]))
        if wanted and "group" in row["epilogue"]:  # wider rotations may have smaller tiles
            wanted = ".f32.e5m2.e5m2"
        if wanted:
            assert any(wanted in name for name in row["instructions"]), row
        if row["kernel"] == "native_mxfp4" and row["epilogue"] == "forward":  # a rotation multiplies in bf16
            assert all("mxf4" in n or "scale" in n or "tcgen05.cp" in n for n in row["instructions"]), row
        if row["kernel"].startswith("native") and row["arch"] in ("100", "103"):  # scales without registers
            assert any("tcgen05.cp" in name for name in row["instructions"]), row
        if row["kernel"] in QUANTISERS:
            assert row["instructions"], "the rotation is a matrix product"


def test_blackwell_rounds_to_e2m1_by_instruction(rows: list[dict]) -> None:
    """On 12.x, too, where instructions that 10.x has alone would be left out in silence."""
    for row in rows:
        if row["kernel"] in QUANTISERS and row["arch"] in BLACKWELL:
            assert row["conversions"] > 0, row
            assert row["conversions"] % 4 == 0, row
        else:
            assert row["conversions"] == 0, row


def test_resources(rows: list[dict]) -> None:
    for row in rows:
        bounded = row["kernel"] == "requantize fp8" and row["arch"] == "90"  # in its registers
        assert row["stack"] <= (16 if bounded else 0), row
        assert row["registers"] <= (512 if row["arch"].startswith("gfx") else 255), row
        assert row["registers"] > 4, row  # what asks for too much tensor memory is compiled to nothing
        assert row["tensor_memory"] <= MAX_TENSOR_MEMORY, row
        assert row["shared"] <= SHARED_BYTES[row["arch"]], row
        if row["kernel"].startswith("native") and row["arch"] in ("100", "103"):  # two programs a multiprocessor
            assert row["tensor_memory"] <= MAX_TENSOR_MEMORY // 2, row
            assert row["shared"] <= (228 * 1024) // 2 - 1024, row


def test_the_page_says_what_compiles(rows: list[dict]) -> None:
    text = resources.PAGE.read_text()
    if f"Triton {version('triton')} " in text:
        assert text == resources.page(rows), "docs/resources.md is old: run python tests/kernels/resources.py"
