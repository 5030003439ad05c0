"""The compiled GEMMs on a GPU: random shapes, epilogues, dtypes, outliers, wide spans; the same bits on every run."""

import random

import pytest
import torch
from gemm_cases import ROUNDING, Case, make_case, relative_error

from quartet_kernels.mxfp4 import decode

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

from quartet_kernels.triton import fp8_matmul, matmul, native_matmul  # noqa: E402
from quartet_kernels.triton.common import tile_scales  # noqa: E402
from quartet_kernels.triton.expand import expand  # noqa: E402
from quartet_kernels.triton.mxfp8 import quantize_mxfp8  # noqa: E402

PRODUCTS = ("packed", "native", "tiled", "mxfp8", "fast", "precise", "pointer")
"""Without FP4 units `native`, `tiled` (scales as capability 10.x reads them, by TMA) and `mxfp8` are decomposed to
bfloat16 by Triton."""
FAST_ERROR = 2e-3
OUTLIER_ERROR = 3e-4


def product(which: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The case through one of the GEMMs; "pointer" is the precise FP8 GEMM without TMA."""
    if which in ("packed", "native"):
        module = matmul if which == "packed" else native_matmul
        return module.matmul(case.a, case.a_scales, case.b, case.b_scales, **case.epilogue)
    if which == "tiled":
        if torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("needs TMA")
        a_scales, b_scales = tile_scales(case.a_scales), tile_scales(case.b_scales)
        return native_matmul.matmul(case.a, a_scales, case.b, b_scales, **case.epilogue)
    if which == "mxfp8":  # E4M3 holds every number of a group of E2M1
        a = quantize_mxfp8(decode(case.a, case.a_scales), transpose=False, native=True)
        b = quantize_mxfp8(decode(case.b, case.b_scales), transpose=False, native=True)
        return native_matmul.matmul(*a, *b, **case.epilogue)
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs FP8 tensor cores")
    a, b = expand(case.a, case.a_scales), expand(case.b, case.b_scales)
    with monkeypatch.context() as patch:
        if which == "pointer":
            patch.setattr(fp8_matmul, "has_tma", lambda device: False)
        return fp8_matmul.matmul(*a, *b, **case.epilogue, accumulation="fast" if which == "fast" else "precise")


@pytest.mark.parametrize("which", PRODUCTS)
def test_random_products(which: str, monkeypatch) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    choose = random.Random(1)
    for index in range(50):
        M = choose.choice([1, 7, 32, 100, 129, 512, 1000, 3000])
        N = 32 * choose.choice([1, 3, 4, 8, 17, 40, 96])
        K = 32 * choose.choice([1, 2, 3, 5, 16, 33, 128])
        dtype = choose.choice(list(ROUNDING))
        spread = choose.choice([2, 2, 6, 20])
        outliers = choose.random() < 0.2
        if dtype == torch.float16:
            spread, outliers = 2, False
        backward = index % 2 == 1
        epilogue = (
            {"mask": True, "group": 32 if N % 128 else choose.choice([0, 32, 64, 128])} if backward else {"bias": True}
        )
        case = make_case(
            generator, M, N, K, out_dtype=dtype, alpha=0.25, spread=spread, outliers=outliers, nan_rows=index % 10 == 9,
            **epilogue,
        )  # fmt: skip
        limit = ROUNDING[dtype]
        if which == "fast":
            limit += FAST_ERROR
        elif which not in ("packed", "native", "tiled", "mxfp8"):
            limit += 3e-5 if spread == 2 and not outliers else OUTLIER_ERROR
        actual = product(which, case, monkeypatch)
        error = relative_error(actual, case.expected)
        assert error < limit, (M, N, K, dtype, spread, outliers, epilogue, error)
        again = product(which, case, monkeypatch)
        assert torch.equal(actual.nan_to_num(), again.nan_to_num()), (M, N, K, dtype)


@pytest.mark.parametrize("which", ["packed", "fast", "precise"])
@pytest.mark.parametrize("N", [33, 250])
def test_columns_that_are_not_a_multiple_of_32(which: str, N: int, monkeypatch) -> None:
    case = make_case(torch.Generator("cuda").manual_seed(2), 65, N, 96, out_dtype=torch.bfloat16, bias=True)
    assert relative_error(product(which, case, monkeypatch), case.expected) < ROUNDING[torch.bfloat16] + FAST_ERROR


@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_unrotate_and_dequantize(group: int, dtype: torch.dtype) -> None:
    case = make_case(
        torch.Generator("cuda").manual_seed(3), 777, 384, 32, out_dtype=dtype, mask=True, group=group, spread=2
    )
    acc = matmul.dequantize(case.a, case.a_scales, dtype=torch.float32).double()
    assert torch.equal(acc, decode(case.a, case.a_scales, torch.float64))
    acc = acc @ matmul.dequantize(case.b, case.b_scales, dtype=torch.bfloat16).double().T
    actual = matmul.unrotate(acc.float(), **{"matrix": None, **case.epilogue})
    limit = 1e-6 if dtype == torch.float32 else ROUNDING[dtype]
    assert relative_error(actual, case.expected) < limit


def test_few_variants_for_many_token_counts() -> None:
    """20 token counts compile at most 3 variants of the FP8 kernel, in forward and in the product over tokens."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs TMA")
    generator = torch.Generator("cuda").manual_seed(4)
    variants = set()
    for tokens in range(1, 4000, 200):
        case = make_case(generator, tokens, 512, 256, out_dtype=torch.bfloat16)
        a, b = expand(case.a, case.a_scales), expand(case.b, case.b_scales)
        fp8_matmul.matmul(*a, *b, **case.epilogue, accumulation="fast")
        tile = fp8_matmul.tma_tile(tokens, 512, 132, False, False, 0, 2)
        variants.add(tile)
    assert len(variants) <= 2
    cache = fp8_matmul.fp8_tma_kernel.device_caches[torch.cuda.current_device()][0]
    before = len(cache)
    for tokens in range(64, 4000, 224):
        padded = (tokens + 31) // 32 * 32
        case = make_case(generator, 512, 256, padded, out_dtype=torch.bfloat16)
        a, b = expand(case.a, case.a_scales), expand(case.b, case.b_scales)
        fp8_matmul.matmul(*a, *b, **case.epilogue, accumulation="fast")
    assert len(cache) - before <= 3


def test_no_host_sync_and_graph_capture() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs FP8 tensor cores")
    case = make_case(
        torch.Generator("cuda").manual_seed(5), 300, 512, 256, out_dtype=torch.float32, mask=True, group=32
    )
    a, b = expand(case.a, case.a_scales), expand(case.b, case.b_scales)
    expected = fp8_matmul.matmul(*a, *b, **case.epilogue, accumulation="precise")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fp8_matmul.matmul(*a, *b, **case.epilogue, accumulation="precise")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


def test_more_than_two_to_the_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    M, N, K = 2**31 // 4096 + 200, 4096, 64
    generator = torch.Generator("cuda").manual_seed(6)
    tail = 128
    codes = torch.zeros(M, K // 2, dtype=torch.uint8, device="cuda")
    scales = torch.full((M, K // 32), 127, dtype=torch.uint8, device="cuda")
    case = make_case(generator, tail, N, K, out_dtype=torch.bfloat16)
    codes[-tail:], scales[-tail:] = case.a, case.a_scales
    out = matmul.matmul(codes, scales, case.b, case.b_scales, alpha=1.0, out_dtype=torch.bfloat16)
    assert relative_error(out[-tail:], case.expected) < ROUNDING[torch.bfloat16]
    if torch.cuda.get_device_capability() >= (8, 9):
        a, b = expand(codes, scales), expand(case.b, case.b_scales)
        out = fp8_matmul.matmul(*a, *b, alpha=1.0, out_dtype=torch.bfloat16, accumulation="precise")
        assert relative_error(out[-tail:], case.expected) < ROUNDING[torch.bfloat16] + 3e-5
