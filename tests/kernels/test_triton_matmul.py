"""The Triton GEMMs and their epilogues under the interpreter, against float64 products of the dequantised operands."""

import pytest
import torch
from gemm_cases import ROUNDING, Case, fp8_operand, make_case, operand, relative_error

from quartet_kernels.mxfp4 import decode

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernels")

from quartet_kernels.triton import fp8_matmul, matmul, native_matmul  # noqa: E402
from quartet_kernels.triton.common import tile_scales  # noqa: E402
from quartet_kernels.triton.mxfp8 import quantize_mxfp8  # noqa: E402

PRODUCTS = ("packed", "native", "tiled", "mxfp8", "fast", "precise", "pointer")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def mxfp8(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_mxfp8(decode(codes, scales), transpose=False, native=True)


def product(which: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The case through one of the GEMMs; "pointer" is the FP8 GEMM without TMA."""
    if which in ("packed", "native"):
        module = matmul if which == "packed" else native_matmul
        return module.matmul(case.a, case.a_scales, case.b, case.b_scales, **case.epilogue)
    if which == "tiled":
        a_scales, b_scales = tile_scales(case.a_scales), tile_scales(case.b_scales)
        return native_matmul.matmul(case.a, a_scales, case.b, b_scales, **case.epilogue)
    if which == "mxfp8":  # E4M3 holds every number of a group of E2M1
        return native_matmul.matmul(*mxfp8(case.a, case.a_scales), *mxfp8(case.b, case.b_scales), **case.epilogue)
    if which == "pointer":
        monkeypatch.setattr(fp8_matmul, "has_tma", lambda device: False)
    a, b = fp8_operand(case.a, case.a_scales), fp8_operand(case.b, case.b_scales)
    return fp8_matmul.matmul(*a, *b, **case.epilogue, accumulation="fast" if which == "fast" else "precise")


@pytest.mark.parametrize("which", PRODUCTS)
@pytest.mark.parametrize("shape", [(1, 1, 32), (70, 96, 96), (130, 200, 160), (16, 264, 32), (257, 31, 288)])
def test_forward(which: str, shape: tuple[int, int, int], generator, monkeypatch) -> None:
    case = make_case(generator, *shape, out_dtype=torch.float32, alpha=16 / 9, bias=True)
    assert relative_error(product(which, case, monkeypatch), case.expected) < 1e-5


@pytest.mark.parametrize("which", PRODUCTS)
@pytest.mark.parametrize(
    ("group", "dtype"),
    [
        (0, torch.float32),
        (32, torch.float32),
        (64, torch.float32),
        (128, torch.float32),
        (32, torch.bfloat16),
        (64, torch.float16),
    ],
)
def test_backward_epilogue(which: str, group: int, dtype: torch.dtype, generator, monkeypatch) -> None:
    case = make_case(generator, 100, 256, 96, out_dtype=dtype, alpha=64 / 27, mask=True, group=group, spread=3)
    actual = product(which, case, monkeypatch)
    assert actual.dtype == dtype
    assert relative_error(actual, case.expected) < ROUNDING[dtype]


@pytest.mark.parametrize("which", PRODUCTS)
def test_rotation_that_is_not_symmetric(which: str, generator, monkeypatch) -> None:
    case = make_case(generator, 33, 128, 64, out_dtype=torch.float32, mask=True, group=64, transform="gsr")
    assert relative_error(product(which, case, monkeypatch), case.expected) < 1e-5


@pytest.mark.parametrize("which", PRODUCTS)
@pytest.mark.parametrize("backward", [False, True])
def test_nan_stays_in_its_row_and_column(which: str, backward: bool, generator, monkeypatch) -> None:
    epilogue = {"mask": True, "group": 32} if backward else {"bias": True}
    case = make_case(generator, 40, 160, 64, out_dtype=torch.float32, nan_rows=True, **epilogue)
    assert case.expected[:-1, :128].isfinite().all()
    assert relative_error(product(which, case, monkeypatch), case.expected) < 1e-5


@pytest.mark.parametrize("which", PRODUCTS)
def test_mask_hides_nan(which: str, generator, monkeypatch) -> None:
    case = make_case(generator, 4, 64, 32, out_dtype=torch.float32, mask=True, nan_rows=True)
    case.epilogue["mask"].zero_()
    assert torch.equal(product(which, case, monkeypatch), torch.zeros(4, 64))


@pytest.mark.parametrize("which", PRODUCTS)
def test_extreme_scales(which: str, generator, monkeypatch) -> None:
    case = make_case(generator, 20, 32, 64, out_dtype=torch.float32)
    case.a_scales.fill_(1)
    case.b_scales.fill_(252)
    case.expected = decode(case.a, case.a_scales, torch.float64) @ decode(case.b, case.b_scales, torch.float64).T
    # MXFP8 flushes groups below 2^-117, FP8 the small ones of rows below 2^-113.
    if which not in ("packed", "native", "tiled"):
        case.a_scales.fill_(20)
        case.expected *= 2.0**19
    assert relative_error(product(which, case, monkeypatch), case.expected) < 1e-5


@pytest.mark.parametrize("which", PRODUCTS)
@pytest.mark.parametrize("shape", [(0, 64, 32), (3, 0, 32), (3, 64, 0)])
def test_empty(which: str, shape: tuple[int, int, int], generator, monkeypatch) -> None:
    M, N, _ = shape
    plain = make_case(generator, *shape, out_dtype=torch.bfloat16, mask=True, group=32)
    assert torch.equal(product(which, plain, monkeypatch), torch.zeros(M, N, dtype=torch.bfloat16))
    biased = make_case(generator, *shape, out_dtype=torch.bfloat16, bias=True)
    expected = biased.epilogue["bias"].to(torch.bfloat16).expand(M, N)
    assert torch.equal(product(which, biased, monkeypatch), expected)


@pytest.mark.parametrize("which", PRODUCTS)
def test_operands_of_any_layout(which: str, generator, monkeypatch) -> None:
    case = make_case(generator, 40, 64, 64, out_dtype=torch.float32, mask=True)
    expected = product(which, case, monkeypatch)
    for name in ("a", "a_scales", "b", "b_scales"):
        setattr(case, name, getattr(case, name).t().contiguous().t())
    case.epilogue["mask"] = case.epilogue["mask"].t().contiguous().t()
    assert torch.equal(product(which, case, monkeypatch), expected)


def test_fp8_operand_that_is_not_aligned(generator) -> None:
    case = make_case(generator, 40, 64, 64, out_dtype=torch.float32)
    (a, a_scale), b = fp8_operand(case.a, case.a_scales), fp8_operand(case.b, case.b_scales)
    shifted = torch.empty(a.numel() + 1, dtype=a.dtype)[1:].view_as(a)
    shifted.view(torch.uint8).copy_(a.view(torch.uint8))
    assert not fp8_matmul.aligned(shifted)
    actual = fp8_matmul.matmul(shifted, a_scale, *b, **case.epilogue, accumulation="fast")
    assert relative_error(actual, case.expected) < 1e-5


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("group", [0, 32, 128])
def test_unrotate(dtype: torch.dtype, group: int, generator) -> None:
    case = make_case(generator, 70, 256, 32, out_dtype=dtype, alpha=1.5, mask=True, group=group, spread=2)
    acc = decode(case.a, case.a_scales, torch.float64) @ decode(case.b, case.b_scales, torch.float64).T
    actual = matmul.unrotate(acc.float(), **{"matrix": None, **case.epilogue})
    assert relative_error(actual, case.expected) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize(dtype: torch.dtype, generator) -> None:
    codes, scales = operand(generator, 37, 320)
    scales[:, 0] = torch.arange(37).to(torch.uint8)  # byte 0 too: 2^-127
    scales[:, 1] = 252
    scales[3, 4] = 255
    codes[3, 64:80] = 0
    expected = decode(codes, scales, torch.float64)
    actual = matmul.dequantize(codes, scales, dtype=dtype)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.signbit(), expected.signbit())


def test_tiles_fit_shared_memory() -> None:
    for precise in (False, True):
        for group in (0, 32, 64, 128):
            for out_bytes in (2, 4):
                for tokens in (1, 100, 4096, 100000):
                    tile = fp8_matmul.tma_tile(tokens, 4096, 132, precise, True, group, out_bytes)
                    assert tile.stages >= 2
                    assert tile.block_n // tile.parts >= group


def test_more_programs_beside_collectives_change_no_number(generator, monkeypatch) -> None:
    case = make_case(generator, 700, 700, 32, out_dtype=torch.float32)
    grids = []
    launch = fp8_matmul.launch
    monkeypatch.setattr(fp8_matmul, "launch", lambda *a, **options: grids.append(a[2]) or launch(*a, **options))
    alone = product("fast", case, monkeypatch)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert torch.equal(product("fast", case, monkeypatch), alone)
    assert grids == [4, 4 * fp8_matmul.SHARED_WAVES]  # of 18 tiles
