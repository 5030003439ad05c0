"""The quantising kernels, in Triton's interpreter, equal the reference bit for bit."""

import functools
import itertools

import pytest
import torch
from gemm_cases import untile
from rounding_cases import half_way
from torch import Tensor

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, about NaN and infinity
if torch.cuda.is_available():
    pytest.skip("the interpreter is only used where there is no GPU: see tests/gpu", allow_module_level=True)

from quartet_kernels import quantize_mxfp4, reference  # noqa: E402
from quartet_kernels.config import QuartetConfig  # noqa: E402
from quartet_kernels.mxfp4 import decode, pack_codes, scale_values, unpack_codes, unpack_mask  # noqa: E402
from quartet_kernels.philox import GRAD, GRAD_T, INPUT_T, SIGNS_DW, draw_signs, make_seed  # noqa: E402
from quartet_kernels.triton.common import tile_scales  # noqa: E402
from quartet_kernels.triton.expand import expand  # noqa: E402
from quartet_kernels.triton.mxfp8 import quantize_mxfp8  # noqa: E402
from quartet_kernels.triton.quantize import quantize_backward, quantize_forward  # noqa: E402
from quartet_kernels.triton.requantize import requantize  # noqa: E402

RECIPES = [
    {"statistic": statistic, "scale_rule": rule}
    for statistic, rule in itertools.product(("rms", "std"), ("mse", "nearest", "floor"))
] + [{"forward_method": "abs_max"}]
TIES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.0])
SEED = make_seed(2**32 - 5, layer=2**31 + 3, step=7, rank=3, micro_batch=2)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_forward(x: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    config = QuartetConfig(**options)
    codes, scales, mask, data, scale = quantize_forward(x, config=config, mask=True)
    assert data is None
    assert scale is None
    expected = reference.quantize_forward(x, config=config, mask=True)
    for ours, theirs in zip((scales, codes, mask), (expected[1], expected[0], expected[2]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    return codes, scales, mask


def edge_groups() -> Tensor:
    """Rows of 64 with what is rare: zeros, ties, subnormals, huge numbers, outliers, NaN and infinity."""
    x = randn(16, 64, seed=5)
    x[0] = 0
    x[1, :32] = -0.0
    x[2, :32] = TIES.repeat(4)
    x[2, 32:] = -TIES.repeat(4)
    x[3] = 3.0  # no deviation
    x[4] = 0
    x[4, 0] = 20  # an outlier, constant after a Hadamard rotation
    x[5] *= 1e-42
    x[6] *= 1e-38
    x[7] *= 1e37
    x[8] = x[8].sign() * 3.0e38
    x[9, 40] = torch.nan
    x[10, 3] = -torch.inf
    x[11, 7] *= 1e4
    x[12] = 5.0 + 1e-6 * x[12]
    x[13] *= 1e-12
    x[14] = x[14].sign() * 2.0**-140
    x[15] = -x[15].abs()
    return x


@pytest.mark.parametrize("recipe", RECIPES)
def test_forward_recipes(recipe):
    for size in (32, 64, 128):
        assert_forward(randn(5, 256, seed=size), hadamard_group_size=size, **recipe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", ["hadamard", "gsr", "identity"])
def test_forward_dtypes_and_transforms(dtype, transform):
    assert_forward(randn(3, 128, dtype=dtype), transform_init=transform)
    assert_forward(randn(3, 128, dtype=dtype), transform_init=transform, hadamard_group_size=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", ["hadamard", "identity"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_forward_edges(recipe, transform, dtype):
    x = edge_groups().to(dtype)
    codes, scales, mask = assert_forward(x, transform_init=transform, **recipe)
    assert (codes[0] == 0).all()
    assert (scales[0] == 0).all()
    assert (mask[0] == -1).all()
    assert scales[9, 1] == 255
    assert scales[10, 0] == 255
    assert (codes[10, :16] == 0).all()
    assert mask[10, 0] == -1
    assert scales[9, 0] != 255, "a NaN stays in its group"


def test_ties_go_to_the_even_code():
    x = torch.cat((TIES, -TIES, torch.full((15,), 1.0), torch.tensor([4.0])))[None]
    codes, scales, mask = assert_forward(x, transform_init="identity", forward_method="quest", scale_rule="floor")
    values = decode(codes, scales)
    unit = 2.0 ** (scales.item() - 127)
    assert unit == 0.5  # the ties of TIES / 0.5 that are on a boundary of the grid
    u = x / unit
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    distance = (u.abs()[..., None] - grid).abs()
    best = distance.min(-1).values
    candidates = distance == best[..., None]
    index = unpack_codes(codes) & 7
    assert candidates.gather(-1, index[..., None].long()).all()
    tie = candidates.sum(-1) > 1
    assert tie.any()
    assert (index[tie] % 2 == 0).all()
    assert torch.equal(unpack_mask(mask), u.abs() < 6)
    assert values.shape == x.shape


def test_abs_max_ties():
    # 3/4 of these, relative to the scale of 6.4, are exactly between two values of the grid.
    x = torch.cat((TIES / 0.75, torch.full((23,), 0.5), torch.tensor([6.4])))[None]
    x[0, :8] = torch.tensor([1 / 3, 1.0, 5 / 3, 7 / 3, 10 / 3, 14 / 3, 20 / 3, 0.0])
    assert_forward(x, transform_init="identity", forward_method="abs_max")
    ours = quantize_forward(
        x * 3, config=QuartetConfig(transform_init="identity", forward_method="abs_max"), mask=False
    )
    theirs = reference.quantize_forward(
        x * 3, config=QuartetConfig(transform_init="identity", forward_method="abs_max"), mask=False
    )
    assert ours[2] is None
    assert torch.equal(ours[0], theirs[0])


def test_every_float_near_a_decision():
    """Nearest rounding on the numbers around each decision, given v: scale 1 in every group."""
    boundaries = torch.cat((TIES[:-1], torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6])))
    bits = boundaries.view(torch.int32)[:, None] + torch.arange(-4, 5)
    u = bits.to(torch.int32).view(torch.float32).flatten()
    x = torch.zeros(len(u), 32)
    x[:, 0], x[:, 1], x[:, 2] = u, -u, 7.9
    assert_forward(x, transform_init="identity", forward_method="abs_max")
    for rule in ("floor", "nearest", "mse"):
        x[:, 2:] = 2.0
        assert_forward(x, transform_init="identity", scale_rule=rule)


def test_saturation_of_both_candidates():
    x = randn(40, 32, seed=9)
    x[:, 3] *= torch.linspace(5, 300, 40)
    x[:, 7] = 0.01
    for rule in ("mse", "nearest", "floor"):
        assert_forward(x, transform_init="identity", scale_rule=rule)
        assert_forward(x - x.mean(-1, keepdim=True), transform_init="identity", statistic="std", scale_rule=rule)


def test_groups_that_a_rotation_makes_constant_are_not_wiped_out():
    """An outlier in the first channel of a block, under the statistic that sees no deviation in it."""
    x = torch.zeros(64, 64)
    x[:, 0] = torch.randn(64).exp()
    x[:, 32] = -torch.randn(64).exp()
    for rule in ("mse", "nearest", "floor"):
        assert_forward(x, statistic="std", scale_rule=rule)
        y = quantize_mxfp4(x, config=QuartetConfig(statistic="std", scale_rule=rule, backend="reference")).dequantize()
        exact = x[:, :1].expand(64, 32) * 32**-0.5
        assert ((y[:, :32] - exact).abs() <= 0.26 * exact.abs()).all()  # of abs-max: 8 becomes 6


@pytest.mark.parametrize("shape", [(0, 64), (1, 32), (67, 96)])
def test_forward_shapes(shape):
    codes, scales, mask = assert_forward(randn(*shape))
    assert codes.shape == (shape[0], shape[1] // 2)
    assert scales.shape == mask.shape == (shape[0], shape[1] // 32)


def test_strided_inputs():
    x = randn(12, 192)
    assert_forward(x[:, 32:160])
    assert_forward(x[::3], hadamard_group_size=64)
    assert_forward(randn(64, 12).t())
    arguments = {"signs": None, "sign_role": None, "seed": None, "role": GRAD, "rounding": "nearest"}
    for y, transpose in itertools.product((x[:, 32:160], x[::3], randn(64, 12).t()), (False, True)):
        ours = quantize_backward(y, transpose=transpose, **arguments)
        for a, b in zip(ours, reference.quantize_backward_packed(y, transpose=transpose, **arguments), strict=True):
            assert torch.equal(a, b)


def backward_arguments(rounding: str, signs: str) -> dict:
    seed = torch.tensor(SEED)
    given = 1 - 2 * (torch.arange(32) % 3 == 0).float() if signs == "given" else None
    return {
        "signs": given,
        "sign_role": SIGNS_DW if signs == "drawn" else None,
        "seed": seed if rounding == "stochastic" or signs == "drawn" else None,
        "role": GRAD_T,
        "rounding": rounding,
    }


def check_operands(quantize, packed: tuple[Tensor, Tensor], values: Tensor) -> None:
    """The packed operand, bit for bit, and the values of the two others."""
    for ours, theirs in zip(quantize("packed"), packed, strict=True):
        assert torch.equal(ours, theirs)
    data, scale = quantize("bf16")
    assert data.dtype == torch.bfloat16
    assert scale.numel() == 0
    torch.testing.assert_close(data.float(), values, rtol=0, atol=0, equal_nan=True)
    data, scale = quantize("fp8")
    assert data.dtype == torch.float8_e5m2
    assert data.float().isfinite().all()
    finite = values.isfinite().all(-1)
    torch.testing.assert_close((data.float() * scale[:, None])[finite], values[finite], rtol=0, atol=0)
    assert scale[~finite].isnan().all()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("signs", ["none", "given", "drawn"])
def test_backward(rounding, signs, transpose):
    arguments = {**backward_arguments(rounding, signs), "transpose": transpose}
    x = randn(70, 96, dtype=torch.bfloat16, seed=3)
    packed = reference.quantize_backward_packed(x, **arguments)
    values, _ = reference.quantize_backward(x, **arguments)
    check_operands(lambda operand: quantize_backward(x, operand=operand, **arguments), packed, values)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_backward_edges(rounding, transpose):
    arguments = {**backward_arguments(rounding, "drawn"), "transpose": transpose}
    x = edge_groups()
    for y in (x, x.repeat(2, 1).t(), half_way().t() if transpose else half_way()):
        ours = quantize_backward(y, **arguments)
        for a, b in zip(ours, reference.quantize_backward_packed(y, **arguments), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_backward_rows_in_fp8_at_once(rounding):
    """As the packed codes expand, also for strided rows, wide spans, zeros, NaN and infinity."""
    arguments = backward_arguments(rounding, "drawn")
    wide = randn(3, 320, seed=7) * 2.0 ** torch.linspace(-40, 20, 10).round().repeat_interleave(32)
    for x in (edge_groups(), wide, randn(9, 192)[:, 32:160], randn(20, 96)[::3]):
        data, scale = quantize_backward(x, operand="fp8", **arguments)
        expected, expected_scale = expand(*quantize_backward(x, **arguments), check_codes=False)
        torch.testing.assert_close(data.float(), expected.float(), rtol=0, atol=0)
        torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("loud", [[], [68], list(range(0, 140, 8))], ids=len)  # tokens, some of them in the sample
def test_requantize_in_fp8_whatever_the_sample_says(loud, monkeypatch):
    """Row exponents are guessed from a few tokens; what a wrong guess leaves is what the packed codes expand to."""
    for exponent, rounding in ((-60, "nearest"), (-25, "stochastic"), (12, "nearest"), (60, "stochastic")):
        if exponent == -25:  # from here on, programs of several tiles
            monkeypatch.setattr("quartet_kernels.triton.requantize.multiprocessors", lambda device: 1)
            monkeypatch.setattr("quartet_kernels.triton.requantize.FP8_PROGRAMS", 1)
        arguments = backward_arguments(rounding, "drawn")
        x = randn(140, 256, seed=7)
        x[:, 128:160] *= 2.0**-90
        x[:, 160:192] = 0
        x[loud] *= 2.0**exponent
        x[3, 7] = torch.nan if exponent == 12 else 1.0
        packed = reference.quantize_forward(x, config=QuartetConfig(), mask=False)[:2]
        data, scale = requantize(*packed, operand="fp8", **arguments)
        expected, expected_scale = expand(*requantize(*packed, **arguments), check_codes=False)
        assert data.float().isfinite().all()
        products = data.double() * scale.double()[:, None], expected.double() * expected_scale.double()[:, None]
        torch.testing.assert_close(*products, rtol=0, atol=0, equal_nan=True)
        assert (scale[160:192] == 1).all()
        if not loud:
            assert not torch.equal(scale[200:], expected_scale[200:]), "no guess was good enough"


def test_requantize_in_fp8_of_many_and_of_no_tokens():
    """More tiles of 128 tokens than are looked through at once, the loudest in the last of them."""
    x = randn(8300, 64, seed=12)
    x[8290, :32] *= 2.0**20
    packed = quantize_forward(x, config=QuartetConfig(), mask=False)[:2]
    data, scale = requantize(*packed, operand="fp8")
    expected, expected_scale = expand(*requantize(*packed), check_codes=False)
    products = data.double() * scale.double()[:, None], expected.double() * expected_scale.double()[:, None]
    torch.testing.assert_close(*products, rtol=0, atol=0)
    data, scale = requantize(packed[0][:0], packed[1][:0], operand="fp8")
    assert data.shape == (64, 0)
    assert (scale == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 130])
def test_backward_ragged(rows, dtype):
    for transpose in (False, True):
        arguments = {**backward_arguments("stochastic", "drawn"), "transpose": transpose}
        x = randn(rows, 160, dtype=dtype, seed=rows)
        ours = quantize_backward(x, **arguments)
        theirs = reference.quantize_backward_packed(x, **arguments)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


def test_stochastic_bits_do_not_depend_on_what_is_beside():
    """Elements under 1 and at the ends of the random byte's range: the reference's rule, not its rounding error."""
    x = torch.cat((randn(64, 32, seed=11) * 2.0 ** -torch.arange(64)[:, None].div(8).floor(), torch.ones(64, 32)), 1)
    x[:, 31] = 7.9
    arguments = {**backward_arguments("stochastic", "none"), "transpose": False}
    ours, theirs = quantize_backward(x, **arguments), reference.quantize_backward_packed(x, **arguments)
    assert torch.equal(ours[0], theirs[0])
    other_seed = {**arguments, "seed": torch.tensor(make_seed(1, layer=2, step=8))}
    assert not torch.equal(quantize_backward(x, **other_seed)[0], ours[0])


def test_drawn_signs_are_the_given_ones():
    x, seed = randn(8, 64), torch.tensor(SEED)
    drawn = quantize_backward(x, sign_role=SIGNS_DW, seed=seed)
    given = quantize_backward(x, signs=draw_signs(seed, SIGNS_DW))
    assert torch.equal(drawn[0], given[0])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("rows", [0, 33, 160])
def test_requantize(rounding, rows):
    x = randn(rows, 96, seed=rows)
    if rows > 40:
        x[5, 40], x[9, :32], x[40:, 64:] = torch.nan, 0.0, 1e38
    codes, scales, *_ = reference.quantize_forward(x, config=QuartetConfig(), mask=False)
    arguments = {**backward_arguments(rounding, "drawn"), "role": INPUT_T}
    dense = decode(codes, scales)
    packed = reference.quantize_backward_packed(dense, transpose=True, **arguments)
    values, _ = reference.requantize(codes, scales, **arguments)
    check_operands(lambda operand: requantize(codes, scales, operand=operand, **arguments), packed, values)


def test_requantize_reads_every_byte_and_code():
    """All 16 codes under the scale bytes 0, 1, 252, 254 and 255."""
    codes = pack_codes((torch.arange(32 * 160).view(32, 160) * 7 % 16).to(torch.uint8))
    scales = torch.tensor([0, 1, 252, 254, 255], dtype=torch.uint8).repeat(32, 1)
    arguments = backward_arguments("nearest", "none")
    ours, theirs = (
        requantize(codes, scales, operand="bf16", **arguments),
        reference.requantize(codes, scales, **arguments),
    )
    torch.testing.assert_close(ours[0].float(), theirs[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("operand", "small"), [("fp8", 2**24), ("fp8", 0), ("bf16", 0)])  # at once, in two steps
@pytest.mark.parametrize("recipe", RECIPES)
def test_forward_operands(recipe, operand, small, monkeypatch):
    monkeypatch.setattr("quartet_kernels.triton.quantize.SMALL", small)
    x = randn(6, 192, seed=4) * 2.0 ** randn(6, 1, seed=6).mul(20).round()
    x[1] = 0
    x[2, 50] = torch.nan
    x[3, 32:] *= 1e-9
    x[4] = randn(192, seed=8) * 1e-12
    config = QuartetConfig(**recipe)
    codes, scales, _, data, scale = quantize_forward(x, config=config, mask=False, operand=operand)
    expected = reference.quantize_forward(x, config=config, mask=False)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales, expected[1])
    values = expected[3]
    if operand == "bf16":
        torch.testing.assert_close(data.float(), values, rtol=0, atol=0, equal_nan=True)
        return
    assert scale[1] == 1
    assert scale[2].isnan()
    finite = torch.tensor([0, 3, 5])
    wide = values.abs().amax(-1, keepdim=True) * 2.0**-30
    error = (data.float() * scale[:, None] - values)[finite]
    assert (error.abs() <= wide[finite]).all()
    assert torch.equal(data[[0, 5]].float() * scale[[0, 5], None], values[[0, 5]])


def test_expand_span_and_edges():
    """Row exponent from groups with a non-zero code, rounding below the span, at least -113, zeros and NaN."""
    codes = pack_codes((torch.arange(8 * 128).view(8, 128) % 16).to(torch.uint8))
    scales = torch.full((8, 4), 127, dtype=torch.uint8)
    scales[0] = torch.tensor([127, 99, 98, 97])
    scales[1] = torch.tensor([200, 127, 100, 80])
    codes[1, :16] = 0x80  # negative zeros do not count
    scales[2] = torch.tensor([1, 3, 5, 7])
    codes[3], scales[3] = 0, 0
    scales[4, 2] = 255
    codes[5] = 0
    scales[6] = 252
    scales[7] = torch.tensor([0, 0, 0, 0])
    data, scale = expand(codes, scales)
    assert data.float().isfinite().all()
    values = decode(codes, scales)
    exponents = torch.tensor([0, 0, -113, 0, 0, 0, 125, -113])
    expected_scale = torch.ldexp(torch.ones(8), exponents - 13)
    expected_scale[[3, 5]] = 1
    expected_scale[4] = torch.nan
    torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)
    relative = values.double() / expected_scale.double()[:, None]
    expected = relative.float().to(torch.float8_e5m2).float()  # float32 holds the quotients
    expected[4] = 0
    torch.testing.assert_close(data.float(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(70, 96), (160, 256), (256, 128)])
def test_tiled_scales(shape):
    """Those of the operands of GPUs of capability 10.x; of groups that do not exist, 127."""
    x = edge_groups().repeat(16, 4)[: shape[0], : shape[1]]
    codes, scales, _, data, tiled = quantize_forward(x, config=QuartetConfig(), mask=False, operand="native")
    assert data is None
    assert torch.equal(untile(tiled, *scales.shape), scales)
    assert torch.equal(untile(tile_scales(scales), *scales.shape), scales)
    assert tiled.shape == tile_scales(scales).shape
    if shape[1] % 128:
        assert (untile(tiled, shape[0], scales.shape[1] + 1)[:, -1] == 127).all()
    arguments = backward_arguments("stochastic", "drawn")
    for quantize, source in (
        (quantize_backward, (x,)),
        (functools.partial(quantize_backward, transpose=True), (x,)),
        (requantize, (codes, scales)),
    ):
        expected_codes, expected = quantize(*source, **arguments)
        ours, tiled = quantize(*source, operand="native", **arguments)
        assert torch.equal(ours, expected_codes)
        assert torch.equal(untile(tiled, *expected.shape), expected)


def assert_mxfp8(expected: Tensor, *x: Tensor, transpose: bool) -> None:
    """Both operand formats hold exactly the reference's values."""
    data, scale = quantize_mxfp8(*x, transpose=transpose, native=False)
    assert data.dtype == torch.bfloat16
    assert scale.numel() == 0
    torch.testing.assert_close(data.float(), expected, rtol=0, atol=0, equal_nan=True)
    data, scales = quantize_mxfp8(*x, transpose=transpose, native=True)
    assert data.dtype == torch.float8_e4m3fn
    assert data.float().isfinite().all()
    scales = untile(scales, len(data), data.shape[1] // 32)
    values = data.float().unflatten(-1, (-1, 32)) * scale_values(scales)[..., None]
    torch.testing.assert_close(values.flatten(-2), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mxfp8(dtype, transpose):
    wide = randn(70, 320, seed=2) * 2.0 ** randn(70, 320, seed=3).mul(8).round()  # E4M3's subnormals, too
    for x in (wide, edge_groups(), edge_groups().repeat(2, 1).t(), randn(20, 96)[::3], randn(0, 32), randn(1, 32)):
        x = x.to(dtype)
        expected, _ = reference.quantize_mxfp8(x, transpose=transpose)
        assert_mxfp8(expected, x, transpose=transpose)


def test_mxfp8_of_packed_codes():
    x = randn(70, 96, seed=1)
    x[5, 40], x[9, :32], x[40:, 64:] = torch.nan, 0.0, 1e38
    x[:, :32] *= 2.0 ** -torch.arange(70.0)[:, None]  # more octaves in a group than E4M3 has
    codes, scales, _, values, _ = reference.quantize_forward(x, config=QuartetConfig(), mask=False)
    expected, _ = reference.quantize_mxfp8(values, transpose=True)
    assert_mxfp8(expected, codes, scales, transpose=True)


def test_every_e4m3_number_and_tie():
    """Codes of E4M3 and what lies halfway between two, relative to a scale of 1: ties go to the even code."""
    grid = torch.arange(0x78, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 to 240
    numbers = torch.cat((grid, (grid[1:] + grid[:-1]) / 2))
    numbers = torch.cat((numbers, numbers.nextafter(numbers * 2), numbers.nextafter(numbers / 2)))
    x = torch.zeros(len(numbers), 32)
    x[:, 0], x[:, 1], x[:, 2] = numbers, -numbers, 255.9
    expected = x.to(torch.float8_e4m3fn).float()
    assert (expected[:, 2] == 256).all()
    assert_mxfp8(expected, x, transpose=False)
