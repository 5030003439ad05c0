"""The reference's quantisers against float64 arithmetic and the published figures."""

import contextlib
import math

import pytest
import torch

from quartet_kernels import QuartetConfig, quantize_mxfp4, quartet_linear, reference, unpack_mask
from quartet_kernels.philox import GRAD, make_seed, random_bytes

GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
RULES = [
    {"statistic": statistic, "scale_rule": rule} for statistic in ("rms", "std") for rule in ("mse", "nearest", "floor")
]


def plain(**options):
    return QuartetConfig(transform_init="identity", **options)


def nearest_even(u):
    """Rounding by search, in float64: the nearest grid value, of two equally near ones that with the even code."""
    distance = (u.double().abs()[..., None] - GRID).abs()
    even_first = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    return GRID[even_first[distance[..., even_first].argmin(-1)]] * u.sign()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_rounding(dtype):
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=dtype)
    around = torch.cat((ties, ties.nextafter(ties - 1), ties.nextafter(ties + 1), torch.tensor([0.0, 6.0, 7.0, 1e7])))
    u = torch.cat((around, -around, torch.randn(10_000, dtype=dtype) * 3)).to(dtype)
    assert torch.equal(reference.round_nearest(u).double(), nearest_even(u))


def test_stochastic_rounding_goes_up_exactly_where_the_contract_says():
    u = torch.cat((torch.rand(4000) * 5.999, torch.tensor([0.0, 0.5, 1.0, 5.5, 1e-7]))) * (-1) ** torch.arange(4005)
    random = torch.randint(0, 256, u.shape, dtype=torch.uint8)
    low = GRID[(u.double().abs()[:, None] >= GRID).sum(-1) - 1]
    high = GRID[(u.double().abs()[:, None] >= GRID).sum(-1).clamp(max=7)]
    up = (u.double().abs() - low) / (high - low) >= (255.5 - random.double()) / 256
    expected = torch.where(up, high, low) * u.sign()
    assert torch.equal(reference.round_stochastic(u, random).double(), expected)


def exponents(tensor):
    return tensor.scales.int() - 127


@pytest.mark.parametrize("options", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projection_follows_its_definition(options, dtype):
    torch.manual_seed(0)
    v = torch.randn(64, 96, dtype=dtype) * torch.exp2(
        torch.randint(-30, 30, (64, 3)).repeat_interleave(32, 1).to(dtype)
    )
    tensor, mask = quantize_mxfp4(v, config=plain(**options), return_mask=True)
    groups = v.double().unflatten(-1, (-1, 32))
    centre = groups.mean(-1, keepdim=True) if options["statistic"] == "std" else 0
    t = 0.48707976 * (groups - centre).square().mean(-1).sqrt()
    low = (t + 1e-8 if options["scale_rule"] == "floor" else t).log2().floor()

    def error(e):
        u = groups * torch.exp2(-e)[..., None]
        return ((u - nearest_even(u)) * torch.exp2(e)[..., None]).square().sum(-1)

    if options["scale_rule"] == "nearest":
        low = low + (t / torch.exp2(low) >= 2**0.5)
    elif options["scale_rule"] == "mse":
        low = torch.where(error(low + 1) < error(low), low + 1, low)
    assert torch.equal(exponents(tensor), low.int())
    u = groups * torch.exp2(-low)[..., None]
    assert torch.equal(tensor.dequantize(torch.float64), (nearest_even(u) * torch.exp2(low)[..., None]).flatten(-2))
    assert torch.equal(unpack_mask(mask), (u.abs() < 6).flatten(-2))
    assert torch.equal(tensor.codes & 8 != 0, v[..., 0::2].signbit())


def test_abs_max_never_clips_and_keeps_its_factor():
    v = torch.randn(64, 96)
    for config, mode in ((plain(forward_method="abs_max"), "forward"), (QuartetConfig(), "backward")):
        tensor, mask = quantize_mxfp4(v, config=config, mode=mode, return_mask=True)
        assert tensor.factor == 4 / 3
        assert (mask == -1).all()
    largest = v.unflatten(-1, (-1, 32)).abs().amax(-1)
    tensor = quantize_mxfp4(v, config=plain(forward_method="abs_max"))
    assert torch.equal(exponents(tensor), largest.log2().floor().int() - 2)
    u = v.double().unflatten(-1, (-1, 32)) * torch.exp2(-exponents(tensor).double())[..., None] * 0.75
    assert u.abs().max() < 6
    assert torch.equal(
        tensor.dequantize(torch.float64) * 0.75,
        (nearest_even(u) * torch.exp2(exponents(tensor).double())[..., None]).flatten(-2),
    )


CONFIGS = [plain(**options) for options in RULES] + [plain(forward_method="abs_max")]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_edges(config):
    v = torch.randn(8, 32).clamp(-2, 2)
    v[0] = 0
    v[1, 5] = math.nan
    v[2, 9] = -math.inf
    v[3] *= 1e38
    v[4] *= 1e-42  # subnormal
    v[5] = torch.tensor([2.5e38, -2.5e38]).repeat(16)
    v[6] = 1.4e-45
    v[7] = 1.0  # no deviation
    tensor, mask = quantize_mxfp4(v, config=config, return_mask=True)
    values = tensor.dequantize()
    assert tensor.scales[0] == 0
    assert not tensor.codes[:3].any()
    assert (mask[:3] == -1).all()
    assert (tensor.scales[1:3] == 255).all()
    assert not values[0].any()
    assert values[1:3].isnan().all()
    rest = tensor.scales[3:].int()
    assert rest.min() >= 1
    assert rest.max() <= 252
    assert values[3:].isfinite().all()
    relative = (values[3] - v[3]).double().norm() / v[3].double().norm()
    assert relative < 0.25
    if config.statistic == "std" and config.forward_method == "quest":
        assert tensor.scales[7] == 127 - 2  # the exponent of abs_max
    else:
        assert torch.allclose(values[7], v[7], rtol=0.17)


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_a_rotated_sum_that_overflows_is_not_finite(mode):
    tensor = quantize_mxfp4(torch.full((1, 32), 3e38), mode=mode)
    assert tensor.scales.item() == 255
    assert tensor.dequantize().isnan().all()


def test_std_has_a_blind_spot_that_rms_has_not():
    torch.manual_seed(1)
    x = torch.randn(256, 32)
    x[:, 0] += 20
    error = {}
    for statistic in ("rms", "std"):
        config = QuartetConfig(statistic=statistic, scale_rule="floor", transform_init="hadamard")
        rotated = reference.rotate(x, reference.rotation_matrix("hadamard", 32, x.device))
        values = quantize_mxfp4(x, config=config).dequantize()
        error[statistic] = ((values - rotated).square().sum() / rotated.square().sum()).item()
    assert error["std"] > 0.2
    assert error["rms"] < 0.03


def test_cancellation_in_the_centred_deviation():
    # E[v^2] - E[v]^2 would lose all digits of this group; two passes do not.
    v = 1000 + torch.tensor([-1.0, 1.0]).repeat(16)[None] * 2**-7
    tensor = quantize_mxfp4(v, config=plain(statistic="std", scale_rule="nearest"))
    assert exponents(tensor).item() == round(math.log2(0.48707976 * 2**-7))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"statistic": "std", "scale_rule": "floor"}, 2.24e-2),
        ({"scale_rule": "floor"}, 2.13e-2),
        ({"scale_rule": "nearest"}, 1.34e-2),
        ({}, 1.25e-2),
    ],
)
def test_forward_error_on_gaussian_data_averaged_over_an_octave(options, expected):
    torch.manual_seed(0)
    errors = []
    for step in range(32):
        x = torch.randn(256, 512) * 2 ** (step / 32)
        values = quantize_mxfp4(x, config=plain(**options)).dequantize()
        errors.append((values - x).square().sum() / x.square().sum())
    assert torch.stack(errors).mean().item() == pytest.approx(expected, rel=0.01)


def test_backward_error_and_misalignment_on_rotated_gaussian_data():
    torch.manual_seed(0)
    relative = {"nearest": [], "stochastic": []}
    inverse = []
    for step in range(32):
        x = torch.randn(512, 512) * 2 ** (step / 32)
        rotated = reference.rotate(x, reference.rotation_matrix("hadamard", 32, x.device))
        for rounding, errors in relative.items():
            values = quantize_mxfp4(x, mode="backward", rounding=rounding, seed=step).dequantize()
            errors.append((values - rotated).square().sum() / rotated.square().sum())
            if rounding == "nearest":
                groups, rounded = rotated.unflatten(-1, (-1, 32)), values.unflatten(-1, (-1, 32))
                inverse.append(((groups * rounded).sum(-1) / groups.square().sum(-1)).mean())  # 1 / S
    assert torch.stack(relative["nearest"]).mean().item() == pytest.approx(1.366e-2, rel=0.01)
    assert torch.stack(relative["stochastic"]).mean().item() == pytest.approx(2.777e-2, rel=0.01)
    assert 1 - torch.stack(inverse).mean().item() == pytest.approx(9.5e-3, rel=0.05)


@pytest.mark.parametrize(("recipe", "expected"), [("fp_quant", 5.6e-2), ("quartet", 2.5e-2)])
def test_error_of_one_linear_on_gaussian_data(recipe, expected):
    torch.manual_seed(0)
    errors = []
    for step in range(16):  # the phase of the scale within its octave averages out
        x, w = torch.randn(256, 512) * 2 ** (step / 16), torch.randn(256, 512) * 2 ** (step / 16)
        y = quartet_linear(x, w, config=QuartetConfig.from_recipe(recipe))
        errors.append((y - x @ w.T).square().sum() / (x @ w.T).square().sum())
    # "std, floor" is stated for sigma = 1, the first of them; "rms, mse" hardly depends on it.
    value = errors[0] if recipe == "fp_quant" else torch.stack(errors).mean()
    assert value.item() == pytest.approx(expected, rel=0.03)


def test_stochastic_rounding_is_unbiased():
    torch.manual_seed(0)
    v = torch.randn(32, 32)
    target = reference.rotate(v, reference.rotation_matrix("hadamard", 32, v.device)).double()
    deviations = {}
    total, drawn = torch.zeros_like(target), 0
    for n in (64, 1024, 4096):
        count = (n - drawn) // 8
        x = v.repeat(8, 1)
        for i in range(count):
            total += (
                quantize_mxfp4(x, mode="backward", rounding="stochastic", seed=drawn + i)
                .dequantize()
                .view(8, 32, 32)
                .double()
                .sum(0)
            )
        drawn = n
        deviations[n] = ((total / n - target).square().mean() / target.square().mean()).sqrt().item()
    assert deviations[64] / deviations[4096] == pytest.approx(8, rel=0.35)  # 1 / sqrt(n)


@pytest.mark.slow
def test_stochastic_rounding_has_less_than_a_five_hundredth_of_a_step_of_bias():
    u = torch.linspace(0.01, 5.9, 32)
    total = torch.zeros(32, dtype=torch.float64)
    draws = 1 << 20
    seed, groups = torch.tensor(make_seed(0)), 1 << 14
    for first in range(0, draws, groups):
        random = random_bytes(seed, GRAD, first, groups)
        total += reference.round_stochastic(u.expand(groups, 32).contiguous(), random).double().sum(0)
    step = torch.where(u < 2, 0.5, torch.where(u < 4, 1.0, 2.0))
    error = (total / draws - u).abs() / step
    assert error.square().mean().sqrt() < 2**-9
    # A probability of 8 bits is at most half of 2**-8 off; the mean of the draws has a deviation of at most 2**-11.
    assert error.max() < 2**-9 + 4 * 2**-11


def test_signs_remove_the_bias_that_fixed_rotations_leave():
    torch.manual_seed(3)
    g, w = torch.randn(64, 64), torch.randn(96, 64)
    g[:, 7] *= 20
    exact = g @ w.T

    def product(signs):
        a = quantize_mxfp4(g, mode="backward", rounding="nearest", signs=signs).dequantize()
        return a @ quantize_mxfp4(w, mode="backward", rounding="nearest", signs=signs).dequantize().T

    fixed = (product(None) - exact).square().sum()
    mean = torch.stack([product(torch.randint(0, 2, (32,)) * 2.0 - 1) for _ in range(200)]).mean(0)
    assert fixed / (mean - exact).square().sum() > 10


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.zeros(2, 33)}, ValueError, "multiple of 32"),
        ({"x": torch.zeros(2, 32), "config": QuartetConfig(hadamard_group_size=64)}, ValueError, "multiple of 64"),
        ({"x": torch.zeros(2, 32, dtype=torch.int32)}, TypeError, "x is torch.int32"),
        ({"x": torch.zeros(2, 32), "mode": "sideways"}, ValueError, "choose 'forward' or 'backward'"),
        ({"x": torch.zeros(2, 32), "rounding": "up", "mode": "backward"}, ValueError, "choose 'nearest'"),
        ({"x": torch.zeros(2, 32), "signs": torch.ones(32)}, ValueError, "belong to mode='backward'"),
        ({"x": torch.zeros(2, 32), "rounding": "stochastic"}, ValueError, "belong to mode='backward'"),
        ({"x": torch.zeros(2, 32), "signs": torch.ones(16), "mode": "backward"}, ValueError, r"float32 \[32\]"),
        (
            {"x": torch.zeros(2, 32), "mode": "backward", "rounding": "stochastic", "seed": torch.zeros(2)},
            ValueError,
            r"int64 \[3\]",
        ),
        ({"x": torch.zeros(2, 32), "backend": "nothing"}, ValueError, "no backend"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize_mxfp4(**arguments)


def test_many_threads_do_not_take_turns(monkeypatch):
    """The product that rotates would wake all of them; the caller's setting is back afterwards, also after an error."""
    found = []

    def rotate(x, matrix):
        found.append(torch.get_num_threads())
        if len(found) == 3:
            raise RuntimeError("the last")
        return x

    before = torch.get_num_threads()
    monkeypatch.setattr(reference, "rotate", rotate)
    try:
        torch.set_num_threads(64)
        for expected in (None, None, RuntimeError):
            with pytest.raises(expected) if expected else contextlib.nullcontext():
                quantize_mxfp4(torch.randn(2, 64), config=QuartetConfig(), backend="reference")
            assert torch.get_num_threads() == 64
    finally:
        torch.set_num_threads(before)
    assert found == [reference.CPU_THREADS] * 3
