"""The quantising kernels on a GPU against the reference on the same GPU.

Sums of a rotation have another order there, so a number may fall on the other side of a decision: every code and scale
must be what the reference decides for some v within 2^-20 max|x| of the float64 one, and hardly any may differ at all.
"""

import pytest
import torch
from gemm_cases import untile
from rounding_cases import half_way
from torch import Tensor

from quartet_kernels import philox, reference
from quartet_kernels.config import QuartetConfig
from quartet_kernels.mxfp4 import decode, scale_values, unpack_codes, unpack_mask
from quartet_kernels.rotation import rotation_matrix

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RECIPES = [{"statistic": s, "scale_rule": r} for s in ("rms", "std") for r in ("mse", "nearest", "floor")]
SEED = philox.make_seed(2**32 - 5, layer=2**31 + 3, step=7, rank=3, micro_batch=2)
SHAPES = [(1000, 4096), (33, 96), (257, 11008)]


def kernels():
    """Imported late: a kernel file decides when it is imported whether it runs in the interpreter."""
    from quartet_kernels.triton import expand, quantize, requantize

    return quantize.quantize_forward, quantize.quantize_backward, requantize.requantize, expand.expand


def data(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Gaussian rows of different size with 0.1% outliers."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(*shape, generator=generator, device="cuda")
    x *= torch.where(torch.rand(*shape, generator=generator, device="cuda") < 1e-3, 50.0, 1.0)
    return (x * torch.randn(shape[0], 1, generator=generator, device="cuda").exp()).to(dtype)


def rotated(x: Tensor, matrix: Tensor | None, signs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """v in float64 and the uncertainty of each element, both [M, K / 32, 32]."""
    size = 32 if matrix is None else matrix.shape[0]
    bound = x.double().abs().unflatten(-1, (-1, size)).amax(-1, keepdim=True).expand(-1, -1, size) * 2.0**-20
    v = reference.rotate(x.double(), matrix, signs)
    return v.unflatten(-1, (-1, 32)), bound.reshape(x.shape).unflatten(-1, (-1, 32))


def assert_rare(different: Tensor) -> None:
    assert different.sum().item() <= max(1, 1e-5 * different.numel())


def assert_codes(codes: Tensor, scales: Tensor, v: Tensor, bound: Tensor, factor: float, rounding) -> None:
    """Each code is the rounding of a number within the bound; scales as given."""
    exponent = scales.to(torch.int32) - 127
    unit = torch.ldexp(torch.ones_like(v[..., 0]), -exponent)[..., None] * factor
    ours = decode(codes, scales, torch.float64).unflatten(-1, (-1, 32)) * torch.ldexp(
        torch.ones_like(unit), -exponent[..., None]
    )
    used = (scales != 255) & (scales != 0)
    low, high = rounding((v - bound) * unit), rounding((v + bound) * unit)
    inside = (low <= ours) & (ours <= high)
    assert inside[used].all()
    assert_rare((ours != rounding(v * unit))[used])


@pytest.mark.parametrize("transpose", [False, True])
def test_a_product_is_rounded_before_the_sum_that_follows(transpose):
    _, quantize_backward, *_ = kernels()
    x = half_way().cuda()
    x = x.t().contiguous() if transpose else x
    arguments = {
        "signs": None, "sign_role": None, "seed": None, "role": 0, "rounding": "nearest", "transpose": transpose,
    }  # fmt: skip
    ours = quantize_backward(x, **arguments)
    for a, b in zip(ours, reference.quantize_backward_packed(x, **arguments), strict=True):
        assert torch.equal(a, b)
    data, scale = quantize_backward(x, operand="fp8", **arguments)
    values, _ = reference.quantize_backward(x, **arguments)
    assert torch.equal(data.float() * scale[:, None], values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [*RECIPES, {"forward_method": "abs_max"}])
def test_forward(options, dtype):
    quantize_forward, *_ = kernels()
    for size, rows, columns in ((32, 1000, 4096), (64, 257, 11008), (128, 300, 1792), (32, 33, 96)):
        x = data(rows, columns, dtype=dtype)
        config = QuartetConfig(hadamard_group_size=size, **options)
        codes, scales, mask, *_ = quantize_forward(x, config=config, mask=True)
        _, expected_scales, expected_mask, *_ = reference.quantize_forward(x, config=config, mask=True)
        assert (scales.int() - expected_scales.int()).abs().max() <= 1
        assert_rare(scales != expected_scales)
        v, bound = rotated(x, rotation_matrix("hadamard", size, x.device, torch.float64))
        factor = 0.75 if config.forward_method == "abs_max" else 1.0
        assert_codes(codes, scales, v, bound, factor, reference.round_nearest)
        assert_rare(
            (unpack_mask(mask) != unpack_mask(expected_mask)) & (scales == expected_scales).repeat_interleave(32, -1)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [*RECIPES, {"forward_method": "abs_max"}])
def test_forward_without_rotation_is_exact(options, dtype):
    """Given v, codes are equal wherever scales are; abs-max scales always are."""
    quantize_forward, *_ = kernels()
    x = data(300, 1024, dtype=dtype)
    x[0], x[1, :32], x[2, 40], x[3, 5] = 0, -0.0, torch.nan, torch.inf
    x[4] *= 1e-30 if dtype != torch.float16 else 1e-5
    x[5, :32] = 3
    if dtype != torch.float16:
        x[6], x[7] = x[6] * 1e-38, x[7].sign() * 3e38
    config = QuartetConfig(transform_init="identity", **options)
    codes, scales, mask, *_ = quantize_forward(x, config=config, mask=True)
    expected = reference.quantize_forward(x, config=config, mask=True)
    same = scales == expected[1]
    assert_rare(~same)
    assert same.all() or config.forward_method == "quest"
    assert torch.equal(
        unpack_codes(codes).unflatten(-1, (-1, 32))[same], unpack_codes(expected[0]).unflatten(-1, (-1, 32))[same]
    )
    assert torch.equal(mask[same], expected[2][same])


def check_backward(codes: Tensor, scales: Tensor, x: Tensor, arguments: dict) -> None:
    if arguments["transpose"]:
        x = torch.nn.functional.pad(x.t(), (0, -x.shape[0] % 32)).contiguous()
    signs = arguments["signs"]
    if signs is None and arguments["sign_role"] is not None:
        signs = philox.draw_signs(arguments["seed"], arguments["sign_role"])
    v, bound = rotated(x, rotation_matrix("hadamard", 32, x.device, torch.float64), signs)
    largest = v.abs().amax(-1)
    exponent = lambda y: (torch.frexp(y).exponent - 3 + 127).clamp(1, 252)  # noqa: E731
    used = (scales != 255) & (scales != 0)
    assert (scales.int() >= exponent((largest - bound[..., 0]).clamp(min=0)))[used].all()
    assert (scales.int() <= exponent(largest + bound[..., 0]))[used].all()
    assert_rare((scales.int() != exponent(largest)) & used)
    assert torch.equal(scales == 0, largest == 0)
    rounding = reference.round_nearest
    if arguments["rounding"] == "stochastic":
        random = philox.random_bytes(arguments["seed"], arguments["role"], 0, scales.numel()).view(v.shape)
        rounding = lambda u: reference.round_stochastic(u.clamp(-5.9999999, 5.9999999), random)  # noqa: E731
    assert_codes(codes, scales, v, bound, 0.75, rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape, transpose, rounding, dtype):
    _, quantize_backward, *_ = kernels()
    seed = torch.tensor(SEED, device="cuda")
    arguments = {
        "signs": None, "sign_role": philox.SIGNS_DW, "seed": seed, "role": philox.GRAD_T,
        "rounding": rounding, "transpose": transpose,
    }  # fmt: skip
    x = data(*shape, dtype=dtype)
    codes, scales = quantize_backward(x, **arguments)
    check_backward(codes, scales, x, arguments)
    again = quantize_backward(x, **arguments)
    assert torch.equal(again[0], codes)
    given = quantize_backward(x, **{**arguments, "signs": philox.draw_signs(seed, philox.SIGNS_DW), "sign_role": None})
    assert torch.equal(given[0], codes)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("shape", SHAPES)
def test_requantize(shape, rounding):
    quantize_forward, _, requantize, _ = kernels()
    codes, scales, *_ = quantize_forward(data(*shape), config=QuartetConfig(), mask=False)
    arguments = {
        "signs": None, "sign_role": philox.SIGNS_DX, "seed": torch.tensor(SEED, device="cuda"), "role": philox.WEIGHT_T,
        "rounding": rounding,
    }  # fmt: skip
    ours = requantize(codes, scales, **arguments)
    check_backward(*ours, decode(codes, scales), {**arguments, "transpose": True})


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("shape", [(300, 4096), (65, 96), (257, 11008), (48, 20480)])
def test_operands_hold_the_packed_values(shape, rounding):
    quantize_forward, quantize_backward, requantize, expand = kernels()
    x = data(*shape)
    x[3, 77], x[5], x[7] = torch.nan, 0, x[7] * 1e-36
    x[9, :32] *= 2.0**-27
    packed = quantize_forward(x, config=QuartetConfig(), mask=False)[:2]
    arguments = {"rounding": rounding, "seed": torch.tensor(SEED, device="cuda"), "role": philox.GRAD}

    def guess(operand):  # row exponents: only their products with the FP8 numbers are fixed
        return requantize(*packed, operand=operand, **arguments)

    for make, (codes, scales) in (
        (lambda operand: quantize_forward(x, config=QuartetConfig(), mask=False, operand=operand)[3:], packed),
        (lambda operand: quantize_backward(x, operand=operand, **arguments), quantize_backward(x, **arguments)),
        (
            lambda operand: quantize_backward(x, operand=operand, transpose=True, **arguments),
            quantize_backward(x, transpose=True, **arguments),
        ),
        (guess, requantize(*packed, **arguments)),
        (lambda operand: expand(*packed) if operand == "fp8" else (decode(*packed, torch.bfloat16), None), packed),
    ):
        values = decode(codes, scales)
        torch.testing.assert_close(make("bf16")[0].float(), values, rtol=0, atol=0, equal_nan=True)
        fp8, row_scale = make("fp8")
        finite = values.isfinite().all(-1)
        assert fp8.float().isfinite().all()
        expanded, expanded_scale = expand(codes, scales)
        used = (unpack_codes(codes) & 7).amax(-1) != 0
        if make is not guess:
            torch.testing.assert_close(fp8.float(), expanded.float(), rtol=0, atol=0)
            torch.testing.assert_close(row_scale[used], expanded_scale[used], rtol=0, atol=0, equal_nan=True)
        products = fp8.float() * row_scale[:, None], expanded.float() * expanded_scale[:, None]
        torch.testing.assert_close(*(product[finite & used] for product in products), rtol=0, atol=0)
        exact = finite & ((scales == 0) | (scales.int() > scales.int().amax(-1, keepdim=True) - 28)).all(-1)
        assert exact.any()
        torch.testing.assert_close((fp8.float() * row_scale[:, None])[exact], values[exact], rtol=0, atol=0)
        assert row_scale[~finite].isnan().all()


def test_non_finite_input_gives_non_finite_groups():
    quantize_forward, quantize_backward, *_ = kernels()
    for dtype in DTYPES:
        for bad in (torch.nan, torch.inf, -torch.inf):
            x = data(128, 256, dtype=dtype)
            x[5, 37] = bad
            codes, scales, mask, *_ = quantize_forward(x, config=QuartetConfig(), mask=True)
            assert (scales == 255).nonzero().tolist() == [[5, 1]]
            assert mask[5, 1] == -1
            assert (codes[5, 16:32] == 0).all()
            assert (quantize_backward(x)[1] == 255).nonzero().tolist() == [[5, 1]]
            assert (quantize_backward(x, transpose=True)[1] == 255).nonzero().tolist() == [[37, 0]]


def test_no_recompilation_for_other_token_counts():
    from quartet_kernels.triton import quantize

    _, quantize_backward, *_ = kernels()
    for kernel in (quantize.quantize_rows_kernel, quantize.quantize_columns_kernel):
        before = sum(len(cache[0]) for cache in kernel.device_caches.values())
        for rows in range(1, 2000, 97):
            quantize_backward(data(rows, 512), transpose=kernel is quantize.quantize_columns_kernel)
        assert sum(len(cache[0]) for cache in kernel.device_caches.values()) - before <= 3


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_mxfp8_is_the_reference_to_the_bit(shape, dtype, transpose):
    from quartet_kernels.triton.mxfp8 import quantize_mxfp8

    x = data(*shape, dtype=dtype)
    x[3, 5] = torch.nan
    x[7] *= 2.0**-20
    codes, scales, *_ = reference.quantize_forward(x, config=QuartetConfig(), mask=False)
    for operand in ((x,), (codes, scales)):
        expected, _ = reference.quantize_mxfp8(x if len(operand) == 1 else decode(*operand), transpose=transpose)
        values, _ = quantize_mxfp8(*operand, transpose=transpose, native=False)
        torch.testing.assert_close(values.float(), expected, rtol=0, atol=0, equal_nan=True)
        if torch.cuda.get_device_capability() >= (8, 9):
            e4m3, bytes_ = quantize_mxfp8(*operand, transpose=transpose, native=True)
            bytes_ = untile(bytes_, len(e4m3), e4m3.shape[1] // 32)
            values = e4m3.float().unflatten(-1, (-1, 32)) * scale_values(bytes_)[..., None]
            torch.testing.assert_close(values.flatten(-2), expected, rtol=0, atol=0, equal_nan=True)
