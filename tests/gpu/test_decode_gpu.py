"""The GEMM of a few tokens on a GPU: products, agreement with the path of many tokens, graphs, compilation."""

import pytest
import torch
from gemm_cases import ROUNDING, make_case, relative_error

from quartet_kernels import QuartetConfig, ops, quantize_mxfp4, quartet_linear
from quartet_kernels.linear import _project
from quartet_kernels.mxfp4 import decode

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

from quartet_kernels.triton.decode import decode_linear, quantize_few  # noqa: E402

SHAPES = [(64, 512), (32, 32), (96, 1024), (64, 544), (8192, 8192), (14336, 4096), (4096, 14336), (6400, 4128)]


@pytest.mark.parametrize("out_dtype", ROUNDING)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_products(N, K, out_dtype):
    generator = torch.Generator("cuda").manual_seed(1)
    config = QuartetConfig()
    for M in (1, 2, 5, 8, 9, 16, 32):
        case = make_case(
            generator, M, N, K, out_dtype=out_dtype, alpha=1 / 16, spread=2, bias=M % 2 == 1, nan_rows=M == 9
        )
        x = torch.randn(M, K, generator=generator, device="cuda", dtype=torch.bfloat16)
        (codes, scales), _, _ = _project(x, config, False)
        expected = decode(codes, scales, torch.float64) @ decode(case.b, case.b_scales, torch.float64).T / 16
        bias = case.epilogue.get("bias")
        options = {"config": config, "alpha": 1 / 16, "bias": bias, "out_dtype": out_dtype}
        y = decode_linear(x, case.b, case.b_scales, **options)
        # Twice what rounding costs on average: the smallest products are too few for an average.
        assert relative_error(y, expected if bias is None else expected + bias) < 2 * ROUNDING[out_dtype], M
        again = decode_linear(x, case.b, case.b_scales, **options)
        assert torch.equal(y.nan_to_num(), again.nan_to_num())


def test_every_code_and_the_ends_of_the_scales():
    config = QuartetConfig(transform_init="identity", forward_method="abs_max")
    codes = (8 * torch.arange(32, device="cuda")[:, None] + torch.arange(64, device="cuda")).to(torch.uint8)
    x = 0.5 * torch.eye(16, 128, device="cuda")
    (x_codes, x_scales), _, _ = _project(x, config, False)
    for byte in (1, 2, 100, 127, 200, 251):
        scales = torch.full((32, 4), byte, dtype=torch.uint8, device="cuda")
        y = decode_linear(x, codes, scales, config=config, alpha=1.0, bias=None, out_dtype=torch.float32)
        expected = decode(x_codes, x_scales).double() @ decode(codes, scales).double().T
        assert torch.equal(y, expected.float()), byte


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"forward_method": "abs_max"}, {"hadamard_group_size": 128}], ids=str)
def test_same_codes_and_result_as_many_tokens(dtype, options):
    torch.manual_seed(0)
    config = QuartetConfig(**options)
    weight = quantize_mxfp4(torch.randn(4096, 2048, device="cuda"), config=config)
    x = torch.randn(64, 2048, device="cuda", dtype=dtype)
    many = quartet_linear(x, weight, config=config)
    (codes, scales), _, _ = _project(x, config, False)
    for tokens in (1, 4, 16, 32):
        part = x[:tokens].clone()
        few = quartet_linear(part, weight, config=config)
        limit = 1e-5 if dtype == torch.float32 else 2**-8
        assert relative_error(few, many[:tokens].double()) < limit
        # The chunk of 64 groups is all of a row; of every 8 elements first the even ones lie together.
        data, scale = quantize_few(part, config)
        numbers = data.view(torch.float8_e5m2).float().reshape(16, -1, 2, 8, 4, 2, 2, 4)
        numbers = numbers.permute(1, 3, 0, 4, 2, 5, 7, 6).reshape(-1, 2048)[:tokens]
        assert torch.equal(numbers * scale[0, :tokens, None], decode(codes, scales)[:tokens])


def test_cuda_graph_and_compile():
    torch.manual_seed(0)
    config = QuartetConfig()
    weight = quantize_mxfp4(torch.randn(2048, 1024, device="cuda"), config=config)
    x = torch.randn(1, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = quartet_linear(x, weight, config=config)
        compiled = torch.compile(lambda t: quartet_linear(t, weight, config=config), fullgraph=True)
        assert torch.equal(compiled(x), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = quartet_linear(x, weight, config=config)
        other = torch.randn_like(x)
        x.copy_(other)
        graph.replay()
        assert torch.equal(y, quartet_linear(other, weight, config=config))
        assert not torch.equal(y, expected)


def test_it_is_used(monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "decode_linear", lambda *a: calls.append(a) or torch.zeros(1, 32, device="cuda"))
    weight = quantize_mxfp4(torch.randn(32, 32, device="cuda"))
    quartet_linear(torch.randn(1, 32, device="cuda"), weight, config=QuartetConfig())
    assert len(calls) == 1
