"""The GEMM of a few tokens with packed weights under the interpreter, and where quartet_linear uses it."""

import dataclasses

import pytest
import torch
from gemm_cases import ROUNDING, make_case, relative_error

import quartet_kernels.linear as linear
from quartet_kernels import MXFP4Tensor, QuartetConfig, quantize_mxfp4, quartet_linear
from quartet_kernels.mxfp4 import decode

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernels")

from quartet_kernels.triton import decode as kernel  # noqa: E402

TRITON = QuartetConfig(backend="triton")


@pytest.mark.parametrize("out_dtype", ROUNDING)
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(1, 64, 512), (3, 32, 32), (8, 96, 1024), (9, 64, 544), (16, 128, 512), (16, 160, 96), (5, 6400, 64)],
)
def test_products(M, N, K, out_dtype):
    generator = torch.Generator().manual_seed(M)
    case = make_case(generator, M, N, K, out_dtype=out_dtype, alpha=16 / 9, bias=N != 96, nan_rows=M > 1)
    x = decode(case.a, case.a_scales, torch.bfloat16)
    epilogue = {"bias": None, **case.epilogue}
    y = kernel.decode_matmul(x, case.b, case.b_scales, **epilogue)
    assert y.dtype == out_dtype
    assert relative_error(y, case.expected) < ROUNDING[out_dtype]


def test_every_code_and_the_ends_of_the_scales():
    codes = torch.arange(256, dtype=torch.uint8).repeat(32, 2)  # [32, 512]: every byte twice
    for byte in (1, 2, 100, 127, 200, 251):
        scales = torch.full((32, 32), byte, dtype=torch.uint8)
        x = torch.eye(1024)[:16].to(torch.bfloat16)
        y = kernel.decode_matmul(x, codes, scales, alpha=1.0, bias=None, out_dtype=torch.float32)
        assert torch.equal(y, decode(codes, scales)[:, :16].t()), byte
    zero = torch.zeros_like(scales)
    y = kernel.decode_matmul(x, torch.zeros_like(codes), zero, alpha=1.0, bias=None, out_dtype=torch.float32)
    assert torch.equal(y, torch.zeros(16, 32))


@pytest.fixture
def uses(monkeypatch):
    """Counts uses of the kernel."""
    calls = []
    original = kernel.decode_matmul
    monkeypatch.setattr(kernel, "decode_matmul", lambda *a, **k: (calls.append(a[0].shape[0]), original(*a, **k))[1])
    return calls


@pytest.mark.parametrize(
    "config",
    [TRITON, dataclasses.replace(TRITON, forward_method="abs_max"), dataclasses.replace(TRITON, transform_init="gsr")],
    ids=str,
)
def test_few_tokens_equal_many(uses, config):
    torch.manual_seed(0)
    weight = quantize_mxfp4(torch.randn(64, 96), config=config, backend="reference")
    x, bias = torch.randn(17, 96), torch.randn(64)
    many = quartet_linear(x, weight, bias, config=config)
    assert uses == []
    for tokens in (1, 7, 16):
        few = quartet_linear(x[:tokens].view(1, tokens, 96), weight, bias, config=config)
        assert few.shape == (1, tokens, 64)
        assert relative_error(few[0], many[:tokens].double()) < 1e-5
    assert uses == [1, 7, 16]


def test_which_calls_use_it(uses):
    weight = torch.randn(32, 32)
    packed = quantize_mxfp4(weight, config=TRITON, backend="reference")
    assert isinstance(packed, MXFP4Tensor)
    x, bias = torch.randn(4, 32), torch.randn(32, requires_grad=True)
    quartet_linear(x, weight, config=TRITON)  # not packed
    quartet_linear(x.clone().requires_grad_(), packed, config=TRITON)
    quartet_linear(x, packed, bias, config=TRITON)
    quartet_linear(x, packed, config=QuartetConfig(backend="reference"))
    quartet_linear(x[:0], packed, config=TRITON)
    quartet_linear(torch.randn(linear.DECODE_TOKENS + 1, 32), packed, config=TRITON)
    assert uses == []
    with torch.no_grad():
        quartet_linear(x, packed, bias, config=TRITON)
    with torch.inference_mode():
        quartet_linear(x.clone().requires_grad_(), packed, config=TRITON)
    with torch.autocast("cpu", torch.bfloat16):
        assert quartet_linear(x, packed, config=TRITON).dtype == torch.bfloat16
    assert uses == [4, 4, 4]


def test_the_operator_passes_opcheck():
    weight = quantize_mxfp4(torch.randn(32, 64), config=TRITON, backend="triton")
    assert isinstance(weight, MXFP4Tensor)
    x = torch.randn(2, 64).to(torch.bfloat16)
    arguments = (x, weight.codes, weight.scales, 1.0, torch.zeros(32), torch.float32)
    torch.library.opcheck(torch.ops.quartet.decode_matmul.default, arguments)
