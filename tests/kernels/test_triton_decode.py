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


IDENTITY = dataclasses.replace(TRITON, transform_init="identity", forward_method="abs_max")


def expected_product(x, case, config):
    """float64 product of the packed weights of a case with the reference's codes of x."""
    quantised = quantize_mxfp4(x, config=config, backend="reference")
    return decode(quantised.codes, quantised.scales, torch.float64) @ decode(case.b, case.b_scales, torch.float64).T


@pytest.mark.parametrize("out_dtype", ROUNDING)
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 64, 512), (3, 32, 32), (8, 96, 1024), (9, 64, 544), (2, 16, 2304), (17, 32, 96)]
)
def test_products(M, N, K, out_dtype):
    generator = torch.Generator().manual_seed(M)
    case = make_case(generator, M, N, K, out_dtype=out_dtype, alpha=16 / 9, bias=N != 96, nan_rows=M > 1)
    x = torch.randn(M, K, generator=generator)
    if M > 8:
        x[-1, 3] = torch.inf
    bias = case.epilogue.get("bias")
    y = kernel.decode_linear(x, case.b, case.b_scales, config=TRITON, alpha=16 / 9, bias=bias, out_dtype=out_dtype)
    expected = expected_product(x, case, TRITON) * 16 / 9
    assert y.dtype == out_dtype
    assert relative_error(y, expected if bias is None else expected + bias) < 2 * ROUNDING[out_dtype]


@pytest.mark.parametrize(
    "options", [{"hadamard_group_size": 64}, {"hadamard_group_size": 128}, {"scale_rule": "floor"}]
)
def test_configurations(options):
    config = dataclasses.replace(TRITON, **options)
    case = make_case(torch.Generator().manual_seed(0), 2, 32, 2304, out_dtype=torch.float32)
    x = torch.randn(4, 2304, generator=torch.Generator().manual_seed(1))[::2]
    y = kernel.decode_linear(x, case.b, case.b_scales, config=config, alpha=1.0, bias=None, out_dtype=torch.float32)
    assert relative_error(y, expected_product(x, case, config)) < 1e-6


@pytest.mark.parametrize("N", [64, 48])
def test_tiles_that_share_tokens(monkeypatch, N):
    monkeypatch.setattr(kernel, "multiprocessors", lambda device: N // 16 / 5)
    assert kernel.form(N // 16, N // 16 / 5, 2, True)[1] == (2 if N == 64 else 1)
    case = make_case(torch.Generator().manual_seed(0), 2, N, 1056, out_dtype=torch.float32, bias=True)
    x = torch.randn(11, 1056, generator=torch.Generator().manual_seed(1))
    bias = case.epilogue["bias"]
    y = kernel.decode_linear(x, case.b, case.b_scales, config=TRITON, alpha=1.0, bias=bias, out_dtype=torch.float32)
    assert relative_error(y, expected_product(x, case, TRITON) + bias) < 1e-6


def test_every_code_and_the_ends_of_the_scales():
    codes = (8 * torch.arange(32)[:, None] + torch.arange(64)).to(torch.uint8)  # the first 8 columns have every byte
    x = 0.5 * torch.eye(16, 128)
    quantised = quantize_mxfp4(x, config=IDENTITY, backend="reference")
    for byte in (0, 1, 127, 251):
        scales = torch.full((32, 4), byte, dtype=torch.uint8)
        weight = codes if byte else torch.zeros_like(codes)
        y = kernel.decode_linear(x, weight, scales, config=IDENTITY, alpha=1.0, bias=None, out_dtype=torch.float32)
        expected = decode(quantised.codes, quantised.scales).double() @ decode(weight, scales).double().T
        assert torch.equal(y, expected.float()), byte


def test_scales_far_apart():
    """Of four neighbouring groups of a weight those within 2^23 of the largest are exact, the others round."""
    codes = torch.full((32, 64), 0x23, dtype=torch.uint8)  # 1.5, 1
    x = torch.zeros(4, 128)
    x[torch.arange(4), torch.arange(4) * 32] = 1.0
    scales = torch.tensor([127, 107, 104, 27], dtype=torch.uint8).repeat(32, 1)
    y = kernel.decode_linear(x, codes, scales, config=IDENTITY, alpha=4 / 3, bias=None, out_dtype=torch.float32)
    assert torch.equal(y[:, 0], torch.tensor([1.5, 1.5 * 2.0**-20, 1.5 * 2.0**-23, 0.0]))


@pytest.fixture
def uses(monkeypatch):
    """Counts uses of the kernel."""
    calls = []
    original = kernel.decode_linear
    monkeypatch.setattr(kernel, "decode_linear", lambda *a, **k: (calls.append(a[0].shape[0]), original(*a, **k))[1])
    return calls


@pytest.mark.parametrize(
    "config",
    [TRITON, dataclasses.replace(TRITON, forward_method="abs_max"), dataclasses.replace(TRITON, transform_init="gsr")],
    ids=str,
)
def test_few_tokens_equal_many(uses, config):
    torch.manual_seed(0)
    weight = quantize_mxfp4(torch.randn(64, 96), config=config, backend="reference")
    x, bias = torch.randn(33, 96), torch.randn(64)
    many = quartet_linear(x, weight, bias, config=config)
    assert uses == []
    for tokens in (1, 9):
        few = quartet_linear(x[:tokens].view(1, tokens, 96), weight, bias, config=config)
        assert few.shape == (1, tokens, 64)
        assert relative_error(few[0], many[:tokens].double()) < 1e-5
    assert uses == [1, 9]


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
    arguments = (torch.randn(2, 64), weight.codes, weight.scales, torch.zeros(32), torch.float32, TRITON.text)
    torch.library.opcheck(torch.ops.quartet.decode_linear.default, arguments)
