"""Properties of the layer and its quantisers over random shapes, dtypes, options and magnitudes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quartet_kernels import QuartetConfig, quantize_mxfp4, quartet_linear, reference, unpack_mask
from quartet_kernels.mxfp4 import scale_values, unpack_codes

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@st.composite
def configs(draw, **fixed):
    options = {
        "forward_method": st.sampled_from(["quest", "abs_max"]),
        "statistic": st.sampled_from(["rms", "std"]),
        "scale_rule": st.sampled_from(["mse", "nearest", "floor"]),
        "hadamard_group_size": st.sampled_from([32, 64, 128]),
        "transform_init": st.sampled_from(["hadamard", "gsr", "identity"]),
        "backward_dtype": st.sampled_from(["mxfp4", "mxfp8", "bf16"]),
        "backward_rounding": st.sampled_from(["nearest", "stochastic"]),
        "randomize_backward": st.booleans(),
        "seed": st.integers(0, 2**32 - 1),
    }
    return QuartetConfig(**{name: fixed.get(name, None) or draw(choice) for name, choice in options.items()})


@st.composite
def strided(draw, shape, dtype, magnitude=1.0):
    """A random tensor of a shape whose last axis may have a stride, or whose storage may be longer."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    kind = draw(st.sampled_from(["contiguous", "padded", "strided", "transposed"]))
    if kind == "padded":
        tensor = torch.randn(*shape[:-1], shape[-1] + 7)[..., 3 : 3 + shape[-1]]
    elif kind == "strided":
        tensor = torch.randn(*shape[:-1], shape[-1] * 2)[..., ::2]
    elif kind == "transposed" and len(shape) > 1:
        tensor = torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    else:
        tensor = torch.randn(shape)
    return (tensor.double() * magnitude).to(dtype)


def magnitudes(dtype):
    """Powers of ten whose products and sums stay finite in the dtype."""
    return st.integers(-36, 36).map(lambda e: 10.0**e) if dtype != torch.float16 else st.just(1.0)


@SETTINGS
@given(data=st.data(), config=configs(), dtype=DTYPES)
def test_finite_input_gives_finite_output_and_gradients(data, config, dtype):
    leading = data.draw(st.lists(st.integers(1, 4), max_size=3))
    tokens = data.draw(st.integers(0, 300 // max(1, torch.tensor(leading).prod().item() if leading else 1)))
    group = 32 if config.transform_init == "identity" else config.hadamard_group_size
    inputs = group * data.draw(st.integers(1, 512 // group))
    outputs = 32 * data.draw(st.integers(1, 16))
    # The product of all three must not leave the dtype: spread one magnitude over them.
    size = data.draw(magnitudes(dtype))
    x = data.draw(strided((*leading, tokens, inputs), dtype, size)).requires_grad_()
    weight = data.draw(strided((outputs, inputs), dtype, min(1.0, 1e-2 / size))).requires_grad_()
    y = quartet_linear(x, weight, config=config, seed=data.draw(st.integers(0, 2**32 - 1)))
    assert y.shape == (*leading, tokens, outputs)
    assert y.dtype == dtype
    assert y.isfinite().all()
    y.backward(torch.randn(y.shape).to(dtype) * (1e-2 / max(size, 1)))
    for tensor in (x, weight):
        assert tensor.grad.shape == tensor.shape
        assert tensor.grad.dtype == dtype
        assert tensor.grad.isfinite().all()


@SETTINGS
@given(
    data=st.data(),
    config=configs(),
    exponents=st.tuples(*[st.integers(-36, 36)] * 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_only_products_that_overflow_are_not_finite(data, config, exponents, dtype):
    """Inputs, weights and gradients of unrelated magnitudes: where norms bound a product, it is finite."""
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    shapes = ((40, 128), (64, 128), (40, 64))
    x, weight, dy = (
        (torch.randn(shape, dtype=torch.float64) * 10.0**exponent).to(dtype)
        for shape, exponent in zip(shapes, exponents, strict=True)
    )
    x.requires_grad_()
    weight.requires_grad_()
    y = quartet_linear(x, weight, config=config, seed=1)
    y.backward(dy)
    limit = torch.finfo(dtype if dtype != torch.float64 else torch.float32).max  # scales are those of float32
    norms = [tensor.detach().double().norm().item() for tensor in (x, weight, dy)]
    for result, a, b in ((y, 0, 1), (x.grad, 2, 1), (weight.grad, 2, 0)):
        if norms[a] * norms[b] < limit / 1e3:
            assert result.isfinite().all()


@SETTINGS
@given(
    data=st.data(),
    config=configs(),
    exponent=st.integers(-36, 36),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_dequantised_values_stay_near_the_rotated_tensor(data, config, exponent, dtype):
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    x = (torch.randn(data.draw(st.integers(1, 8)), 128, dtype=torch.float64) * 10.0**exponent).to(dtype)
    v = reference.rotate(x, reference.rotation_matrix(config.transform_init, config.hadamard_group_size, x.device))
    packed, mask = quantize_mxfp4(x, config=config, return_mask=True)
    values = packed.dequantize(torch.float64)
    v = v.double()
    # Element by element: half of the grid's widest step, from 4 to 6; what is clipped lay beyond 6 and becomes 6.
    unit = (scale_values(packed.scales, torch.float64) * packed.factor).repeat_interleave(32, -1)
    kept = unpack_mask(mask)
    slack = 1 + 1e-6
    assert ((values - v).abs() <= unit * slack)[kept].all()
    assert (values.abs() == 6 * unit)[~kept].all()
    assert (v.abs() >= 6 * unit / slack)[~kept].all()
    groups, errors = v.unflatten(-1, (-1, 32)), (values - v).unflatten(-1, (-1, 32))
    # Half a step of the grid at the group's own scale or the clipped rest, never more than the group's own norm.
    relative = errors.norm(dim=-1) / groups.norm(dim=-1)
    assert relative.max() < (0.55 if config.scale_rule == "floor" and config.statistic == "std" else 0.4)
    same_sign = (values == 0) | (values.sign() == v.sign())
    assert same_sign.all()


def test_the_grid_is_a_fixed_point_of_rounding():
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = torch.cat((grid, -grid))
    assert torch.equal(reference.round_nearest(grid), grid)
    inside = grid[grid.abs() < 6, None].expand(-1, 256)
    random = torch.arange(256, dtype=torch.uint8).expand_as(inside)
    assert torch.equal(reference.round_stochastic(inside, random), inside)


@SETTINGS
@given(data=st.data(), rule=st.sampled_from(["mse", "nearest"]))
def test_quantising_twice_changes_nothing_where_the_scale_stays(data, rule):
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    config = QuartetConfig(transform_init="identity", scale_rule=rule)
    first = quantize_mxfp4(torch.randn(8, 128) * 10.0 ** data.draw(st.integers(-30, 30)), config=config)
    second = quantize_mxfp4(first.dequantize(), config=config)
    same = first.scales == second.scales
    values = [tensor.dequantize().unflatten(-1, (-1, 32))[same] for tensor in (first, second)]
    assert torch.equal(*values)
    assert same.float().mean() > 0.5


@SETTINGS
@given(data=st.data())
def test_quantising_twice_by_the_maximum_changes_nothing_below_the_largest_code(data):
    """A group whose largest code is 3 or 4 keeps its exponent; 6 times 4/3 is 8, in the next octave."""
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    config = QuartetConfig(forward_method="abs_max", transform_init="identity")
    first = quantize_mxfp4(torch.randn(32, 128) * 10.0 ** data.draw(st.integers(-30, 30)), config=config)
    second = quantize_mxfp4(first.dequantize(), config=config)
    top = (unpack_codes(first.codes) & 7).unflatten(-1, (-1, 32)).amax(-1)
    assert (second.scales.int() - first.scales.int() == (top == 7).int()).all()
    same = (top < 7)[..., None].expand(*top.shape, 16).flatten(-2)
    assert torch.equal(first.codes[same], second.codes[same])
    assert same.float().mean() > 0.1


@pytest.mark.parametrize("power", [-20, 20, 60])
def test_codes_do_not_depend_on_a_power_of_two(power):
    """A gradient scaler's factor is invisible to power-of-two scales."""
    x = torch.randn(16, 128)
    for config in (QuartetConfig(), QuartetConfig(forward_method="abs_max")):
        tensor, scaled = quantize_mxfp4(x, config=config), quantize_mxfp4(x * 2.0**power, config=config)
        assert torch.equal(tensor.codes, scaled.codes)
        assert torch.equal(tensor.scales.int() + power, scaled.scales.int())
