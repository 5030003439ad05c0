"""quartet_linear: conformance, gradients, operators, compilation, bad input."""

import gc
import itertools
import math
import threading
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from functorch.compile import make_boxed_func
from identity_quantisers import take_out_quantisers
from safetensors.torch import load_file
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from quartet_kernels import (
    MXFP4Tensor,
    QuartetConfig,
    mxfp4_matmul,
    quantize_mxfp4,
    quartet_linear,
    reference,
    unpack_mask,
)
from quartet_kernels.linear import _constant_seed, _last_input, finish_gradient, weight_window
from quartet_kernels.ops import forward_factor
from quartet_kernels.philox import draw_signs, make_seed
from quartet_kernels.rotation import _matrix, rotation_matrix

CONFORMANCE = Path(__file__).parents[1] / "data" / "conformance"


def relative(value, expected):
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(params=["q0", "up2", "outlier"])
def recorded(request):
    return {
        name: t.float() if t.is_floating_point() else t
        for name, t in load_file(CONFORMANCE / f"{request.param}.safetensors").items()
    }


def gradients(x, weight, config, dy, **options):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = quartet_linear(x, weight, config=config, **options)
    y.backward(dy)
    return y.detach(), x.grad, weight.grad


def test_released_kernel_is_reproduced(recorded):
    config = QuartetConfig.from_recipe("fp_quant")
    for name, source in (("x", "x"), ("w", "weight")):
        tensor, mask = quantize_mxfp4(recorded[source], config=config, return_mask=True)
        assert torch.equal(tensor.dequantize(), recorded[f"{name}_dequantized"])
        assert torch.equal(unpack_mask(mask), recorded[f"{name}_mask"].bool())
    signs = (recorded["signs"], recorded["signs"])
    y, dx, dw = gradients(recorded["x"], recorded["weight"], config, recorded["grad_output"], signs=signs)
    assert relative(y, recorded["y"]) < 1e-6
    assert relative(dx, recorded["dx_mxfp4_nearest"]) < 1e-5
    assert relative(dw, recorded["dw_mxfp4_nearest"]) < 1e-5


def test_released_straight_through_gradient_is_reproduced(recorded):
    # Ours casts dy to bfloat16. The gradient is linear in dy, so three pieces of it that bfloat16 holds exactly add up.
    config = QuartetConfig.from_recipe("fp_quant", backward_dtype="bf16")
    rest, dx, dw = recorded["grad_output"], 0, 0
    for _ in range(3):
        piece = rest.bfloat16().float()
        rest = rest - piece
        _, dx_piece, dw_piece = gradients(recorded["x"], recorded["weight"], config, piece)
        dx, dw = dx + dx_piece, dw + dw_piece
    assert relative(dx, recorded["dx_ste"]) < 1e-5
    assert relative(dw, recorded["dw_ste"]) < 1e-5


def test_backward_operands_of_the_released_kernel(recorded):
    config = QuartetConfig.from_recipe("fp_quant")
    options = {"config": config, "mode": "backward", "signs": recorded["signs"]}
    sources = {
        "e": recorded["grad_output"],
        "wT": recorded["w_dequantized"].T,
        "eT": recorded["grad_output"].T,
        "xT": recorded["x_dequantized"].T,
    }
    for name, source in sources.items():
        values = quantize_mxfp4(source, **options).dequantize()
        assert relative(values, recorded[f"{name}_rot_dequantized"]) < 1e-6


SHAPES = [(64, 128, 96), (33, 128, 32), (1, 256, 64)]
CONFIGS = [
    QuartetConfig(),
    QuartetConfig(backward_rounding="stochastic"),
    QuartetConfig(forward_method="abs_max", hadamard_group_size=64),
    QuartetConfig(transform_init="gsr", hadamard_group_size=128, statistic="std", scale_rule="nearest"),
    QuartetConfig(transform_init="identity", randomize_backward=False),
    QuartetConfig(backward_dtype="bf16", hadamard_group_size=64),
    QuartetConfig(backward_dtype="bf16", forward_method="abs_max", transform_init="identity"),
    QuartetConfig(backward_dtype="mxfp8"),
    QuartetConfig(backward_dtype="mxfp8", forward_method="abs_max", transform_init="gsr", hadamard_group_size=64),
]


def composed(x, weight, config, dy, seed):
    """The layer from public quantisers and float64 products, in another way than the implementation's."""
    f = forward_factor(config)
    matrix = rotation_matrix(config.transform_init, config.hadamard_group_size, x.device)
    xq, x_mask = quantize_mxfp4(x, config=config, return_mask=True)
    wq, w_mask = quantize_mxfp4(weight, config=config, return_mask=True)
    y = xq.dequantize(torch.float64) @ wq.dequantize(torch.float64).T

    def back(gradient, mask):
        return reference.rotate(gradient * unpack_mask(mask), None if matrix is None else matrix.T)

    if config.backward_dtype == "bf16":
        dy = dy.bfloat16().double()
        return y, back(dy @ wq.dequantize(torch.float64), x_mask), back(dy.T @ xq.dequantize(torch.float64), w_mask)

    if config.backward_dtype == "mxfp8":

        def operand8(tensor):  # frexp's mantissa has 4 bits, or fewer below the smallest normal number
            tensor = torch.nn.functional.pad(tensor, (0, -tensor.shape[1] % 32)).double().unflatten(-1, (-1, 32))
            scale = torch.exp2(torch.frexp(tensor.abs().amax(-1, keepdim=True)).exponent - 1.0 - 7)
            step = torch.exp2(torch.frexp(tensor / scale).exponent.clamp(min=-5) - 4.0)
            return ((tensor / scale / step).round() * step * scale).flatten(-2)

        dx = operand8(dy) @ operand8(wq.dequantize(torch.float64).T / f).T * f
        dw = operand8(dy.T) @ operand8(xq.dequantize(torch.float64).T / f).T * f
        return y, back(dx, x_mask), back(dw, w_mask)

    def operand(tensor, signs, role):
        tensor = torch.nn.functional.pad(tensor, (0, -tensor.shape[1] % 32)).contiguous()
        packed = reference.quantize_backward_packed(
            tensor,
            signs=signs,
            sign_role=None,
            seed=seed,
            role=role,
            rounding=config.backward_rounding,
            transpose=False,
        )
        return MXFP4Tensor(*packed, 4 / 3).dequantize(torch.float64)

    s_dx, s_dw = (draw_signs(seed, role) if config.randomize_backward else None for role in (0, 1))
    dx = operand(dy, s_dx, 2) @ operand((wq.dequantize(torch.float64) / f).float().T, s_dx, 3).T * f
    dw = operand(dy.T, s_dw, 4) @ operand((xq.dequantize(torch.float64) / f).float().T, s_dw, 5).T * f
    return y, back(dx, x_mask), back(dw, w_mask)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_forward_and_gradients_are_the_products_of_the_quantised_operands(config, shape):
    tokens, inputs, outputs = shape
    torch.manual_seed(0)
    x, weight, dy = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(tokens, outputs)
    seed = torch.tensor(make_seed(3, 1, 2))
    values = gradients(x, weight, config, dy, seed=seed)
    for value, expected in zip(values, composed(x, weight, config, dy, seed), strict=True):
        assert relative(value, expected) < 1e-6


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_with_identity_quantisers_the_layer_is_a_linear_layer(config, monkeypatch):
    """Rotations, signs, transposes, masks and factors cancel exactly; only the quantisers are taken out."""

    take_out_quantisers(monkeypatch)
    torch.manual_seed(0)
    x, weight, dy = torch.randn(50, 128), torch.randn(96, 128), torch.randn(50, 96).bfloat16().float()
    y, dx, dw = gradients(x, weight, config, dy, seed=3)
    assert relative(y, x @ weight.T) < 1e-5
    assert relative(dx, dy @ weight) < 1e-5
    assert relative(dw, dy.T @ x) < 1e-5


@pytest.mark.parametrize("method", ["quest", "abs_max"])
def test_straight_through_gradient_is_that_of_its_float64_model(method):
    config = QuartetConfig(backward_dtype="bf16", forward_method=method, hadamard_group_size=64)
    torch.manual_seed(0)
    x, weight = torch.randn(12, 64, dtype=torch.float64) * 3, torch.randn(32, 64, dtype=torch.float64)
    dy = torch.randn(12, 32).bfloat16().double()
    values = gradients(x, weight, config, dy)
    matrix = rotation_matrix("hadamard", 64, x.device).double() / 8

    def model(tensor):
        rotated = tensor @ matrix
        packed, mask = quantize_mxfp4(tensor, config=config, return_mask=True)
        quantised = packed.dequantize(torch.float64)
        through = rotated * unpack_mask(mask)  # value quantised, gradient that of the rotated tensor where not clipped
        return quantised.detach() + through - through.detach()

    x.requires_grad_()
    weight.requires_grad_()
    y = model(x) @ model(weight).T
    y.backward(dy)
    for value, expected in zip(values, (y, x.grad, weight.grad), strict=True):
        assert relative(value, expected) < 1e-12


def test_bias_leading_dimensions_and_zero_tokens():
    config = QuartetConfig()
    x = torch.randn(2, 3, 5, 64, requires_grad=True)
    weight, bias = torch.randn(32, 64, requires_grad=True), torch.randn(32, requires_grad=True)
    y = quartet_linear(x, weight, bias, config=config)
    plain = quartet_linear(x.detach().reshape(30, 64), weight.detach(), config=config)
    assert torch.equal(y.detach(), (plain + bias).view(2, 3, 5, 32))
    dy = torch.randn_like(y)
    y.backward(dy)
    assert torch.allclose(bias.grad, dy.sum((0, 1, 2)), rtol=1e-6)
    assert x.grad.shape == x.shape

    weight.grad = None
    empty = torch.empty(0, 64, requires_grad=True)
    y = quartet_linear(empty, weight, bias, config=config)
    assert y.shape == (0, 32)
    y.sum().backward()
    assert empty.grad.shape == (0, 64)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("shape", [(40, 64), (2, 20, 64)], ids=str)
def test_the_output_may_be_written_in_place(shape):
    x, weight = torch.randn(shape), torch.randn(32, 64, requires_grad=True)
    y = quartet_linear(x, weight, config=QuartetConfig(), seed=1)
    y += 1
    torch.nn.functional.relu(y, inplace=True)
    y.sum().backward()
    other = weight.detach().requires_grad_()
    (quartet_linear(x, other, config=QuartetConfig(), seed=1) + 1).relu().sum().backward()
    assert torch.equal(weight.grad, other.grad)


def test_a_token_vector_without_a_batch():
    y = quartet_linear(torch.randn(64), torch.randn(32, 64), config=QuartetConfig())
    assert y.shape == (32,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_give_sixteen_bit_outputs_and_gradients(dtype):
    torch.manual_seed(0)
    x, weight, dy = torch.randn(40, 64, dtype=dtype), torch.randn(32, 64, dtype=dtype), torch.randn(40, 32, dtype=dtype)
    values = gradients(x, weight, QuartetConfig(), dy, seed=1)
    expected = gradients(x.float(), weight.float(), QuartetConfig(), dy.float(), seed=1)
    for value, target in zip(values, expected, strict=True):
        assert value.dtype == dtype
        assert relative(value, target) < 2**-8


def test_float32_master_weights_keep_their_gradient_under_autocast():
    x, weight = torch.randn(40, 64), torch.randn(32, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quartet_linear(x, weight, config=QuartetConfig())
    assert y.dtype == torch.bfloat16
    assert relative(y, quartet_linear(x, weight, config=QuartetConfig())) < 2**-8
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_reference_is_not_touched_by_reduced_precision_settings():
    x, weight = torch.randn(64, 64), torch.randn(32, 64)
    before = quantize_mxfp4(x).codes
    y = quartet_linear(x, weight, config=QuartetConfig())
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(quantize_mxfp4(x).codes, before)
        assert relative(quartet_linear(x, weight, config=QuartetConfig()), y) < 1e-6
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("place", ["x", "weight", "dy"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("backward_dtype", ["mxfp4", "mxfp8", "bf16"])
def test_what_is_not_finite_reaches_the_result(place, value, backward_dtype):
    tensors = {"x": torch.randn(40, 64), "weight": torch.randn(32, 64), "dy": torch.randn(40, 32)}
    tensors[place][3, 5] = value
    y, dx, dw = gradients(tensors["x"], tensors["weight"], QuartetConfig(backward_dtype=backward_dtype), tensors["dy"])
    assert y.isfinite().all() == (place == "dy")
    assert not dx[3].isfinite().all() or place == "x"
    assert not (dx.isfinite().all() and dw.isfinite().all())
    others = torch.arange(40) != 3
    if place != "weight":
        assert y[others].isfinite().all()
        assert dx[others].isfinite().all()


def test_the_same_seed_gives_the_same_bits_and_another_gives_others():
    torch.manual_seed(0)
    x, weight, dy = torch.randn(64, 64), torch.randn(64, 64), torch.randn(64, 64)
    for config in (QuartetConfig(), QuartetConfig(randomize_backward=False, backward_rounding="stochastic")):
        first = gradients(x, weight, config, dy, seed=1)
        again = gradients(x, weight, config, dy, seed=1)
        other = gradients(x, weight, config, dy, seed=2)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert torch.equal(first[0], other[0])
        assert not torch.equal(first[1], other[1])
        assert not torch.equal(first[2], other[2])
        default = gradients(x, weight, QuartetConfig.from_dict({**config.to_dict(), "seed": 2}), dy)
        assert torch.equal(default[2], other[2])


def test_a_seed_advanced_after_the_forward_does_not_change_the_backward():
    x, weight = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64)
    words = torch.tensor(make_seed(4))
    y = quartet_linear(x, weight, config=QuartetConfig(), seed=words)
    words[1] += 1
    y.backward(torch.ones_like(y))
    z = x.detach().requires_grad_()
    quartet_linear(z, weight, config=QuartetConfig(), seed=4).backward(torch.ones_like(y))
    assert torch.equal(x.grad, z.grad)


def test_the_users_random_streams_are_not_consumed():
    state = torch.random.get_rng_state()
    config = QuartetConfig(backward_rounding="stochastic")
    gradients(torch.ones(32, 64), torch.ones(32, 64), config, torch.ones(32, 32))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_saved_for_backward_is_two_thirds_of_a_byte_an_element():
    x, weight = torch.randn(512, 256, requires_grad=True), torch.randn(256, 256, requires_grad=True)
    y = quartet_linear(x, weight, config=QuartetConfig(), seed=torch.tensor([0, 0, 0]))
    saved = sum(t.nbytes for t in y.grad_fn.next_functions[0][0].saved_tensors if t is not None)
    assert saved - 3 * 8 <= 0.65626 * (x.numel() + weight.numel())


def test_packed_weights_give_the_same_output_and_input_gradient():
    torch.manual_seed(0)
    for config in (QuartetConfig(), QuartetConfig(backward_dtype="mxfp8"), QuartetConfig(forward_method="abs_max")):
        x, weight, dy = torch.randn(40, 64), torch.randn(32, 64), torch.randn(40, 32)
        y, dx, _ = gradients(x, weight, config, dy, seed=1)
        packed = quantize_mxfp4(weight, config=config)
        x.requires_grad_()
        again = quartet_linear(x, packed, config=config, seed=1)
        again.backward(dy)
        assert torch.equal(again, y)
        assert torch.equal(x.grad, dx)


@pytest.mark.parametrize("rows", [(0, 32), (8, 19), (5, 5)])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_master_of_a_packed_weight_gets_a_gradient_that_can_be_finished_by_rows(config, rows):
    torch.manual_seed(0)
    x, weight, dy = torch.randn(40, 128), torch.randn(32, 128), torch.randn(40, 32)
    y, dx, dw = gradients(x, weight, config, dy, seed=1)
    x.requires_grad_()
    master = torch.full_like(weight, math.nan).requires_grad_()  # never read
    again = quartet_linear(x, quantize_mxfp4(weight, config=config), config=config, seed=1, master=master)
    again.backward(dy)
    assert torch.equal(again, y)
    assert torch.equal(x.grad, dx)
    rows, mask = slice(*rows), None
    if config.forward_method == "quest":
        _, mask = quantize_mxfp4(weight[rows], config=config, return_mask=True)
    torch.testing.assert_close(finish_gradient(master.grad[rows], mask, config), dw[rows], rtol=1e-6, atol=1e-5)


def test_matmul_of_packed_tensors():
    torch.manual_seed(0)
    a = quantize_mxfp4(torch.randn(33, 96), config=QuartetConfig(forward_method="abs_max"))
    b, bias = quantize_mxfp4(torch.randn(40, 96)), torch.randn(40)
    value = mxfp4_matmul(a, b, alpha=0.5, bias=bias, out_dtype=torch.float32)
    assert relative(value, 0.5 * a.dequantize(torch.float64) @ b.dequantize(torch.float64).T + bias) < 1e-6
    assert mxfp4_matmul(a, b).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"\[M, K\] and \[N, K\]"):
        mxfp4_matmul(a, quantize_mxfp4(torch.randn(40, 64)))
    with pytest.raises(TypeError, match="out_dtype"):
        mxfp4_matmul(a, b, out_dtype=torch.int32)
    with pytest.raises(ValueError, match="bias is"):
        mxfp4_matmul(a, b, bias=torch.zeros(3))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 32)}, ValueError, "last axis must be in_features = 64"),
        ({"x": torch.zeros(())}, ValueError, "last axis must be in_features"),
        ({"weight": torch.zeros(32, 64, 1)}, ValueError, r"\[out_features, in_features\]"),
        ({"weight": torch.zeros(33, 64)}, ValueError, "out_features is 33"),
        ({"x": torch.zeros(4, 48), "weight": torch.zeros(32, 48)}, ValueError, "in_features is 48"),
        ({"config": QuartetConfig(hadamard_group_size=128)}, ValueError, "multiple of the rotation's 128"),
        ({"config": "quartet"}, TypeError, "pass a QuartetConfig"),
        ({"x": torch.zeros(4, 64, dtype=torch.int64)}, TypeError, "x is torch.int64"),
        ({"weight": torch.zeros(32, 64, device="meta")}, ValueError, "weight is on meta"),
        ({"bias": torch.zeros(31)}, ValueError, r"must be \[32\]"),
        ({"seed": torch.zeros(3)}, ValueError, r"int64 \[3\]"),
        ({"seed": -1}, ValueError, "seed of a random stream"),
        ({"signs": (torch.ones(32), torch.ones(31))}, ValueError, r"float32 \[32\]"),
        ({"master": torch.zeros(32, 64)}, ValueError, "goes with a packed weight"),
        ({"config": QuartetConfig(backend="fp8")}, RuntimeError, "cannot run on cpu"),
    ],
)
def test_bad_input_gets_one_sentence(change, error, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    arguments = {
        "x": torch.zeros(4, 64, requires_grad=True),
        "weight": torch.zeros(32, 64),
        "config": QuartetConfig(),
        **change,
    }
    with pytest.raises(error, match=message):
        quartet_linear(**arguments)


def operator_arguments():
    x, w = torch.randn(34, 64), torch.randn(32, 64)
    config = QuartetConfig(backend="reference").text
    codes, scales, mask, data, scale = torch.ops.quartet.quantize_forward(x, config, True)
    w_codes, w_scales, _, w_data, w_scale = torch.ops.quartet.quantize_forward(w, config, True)
    seed, dy = torch.tensor([1, 2, 3]), torch.randn(34, 32)
    yield "quantize_forward", (x, QuartetConfig(forward_method="abs_max", transform_init="identity").text, False)
    gsr = QuartetConfig(statistic="std", scale_rule="floor", transform_init="gsr", hadamard_group_size=64)
    yield "quantize_forward", (x, gsr.text, True)
    yield "expand", (codes, scales, torch.float32, config)
    yield "matmul", (data, scale, w_data, w_scale, torch.randn(32), torch.bfloat16, config)
    for_input, for_weight = (dy, w_codes, w_scales, mask), (dy, codes, scales, None)
    yield "gradient", (*for_input, seed, None, False, True, torch.float32, config)
    stochastic = QuartetConfig(backward_rounding="stochastic").text
    yield "gradient", (*for_weight, seed, torch.ones(32), True, False, torch.bfloat16, stochastic)
    yield "gradient", (*for_weight, None, None, True, True, torch.float32, QuartetConfig(backward_dtype="bf16").text)
    yield "gradient", (*for_input, None, None, False, True, torch.float32, QuartetConfig(backward_dtype="mxfp8").text)


@pytest.mark.parametrize(("name", "arguments"), list(operator_arguments()))
def test_operators_pass_opcheck(name, arguments):
    torch.library.opcheck(getattr(torch.ops.quartet, name).default, arguments)


@pytest.mark.filterwarnings("error:Dynamo:UserWarning")
@pytest.mark.parametrize("config", [QuartetConfig(), QuartetConfig(backward_dtype="mxfp8")], ids=str)
def test_compiles_without_graph_break_or_recompilation(config):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def layer(x, seed):
        return torch.relu(quartet_linear(x, model.weight, model.bias, config=config, seed=seed))

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for step in range(10):
        seed = torch.tensor(make_seed(0, 1, step))
        x = torch.randn(40, 64)
        results = []
        for function in (layer, compiled):
            z = x.clone().requires_grad_()
            model.zero_grad()
            y = function(z, seed)
            y.square().sum().backward()
            results.append((y.detach(), z.grad, model.weight.grad, model.bias.grad))
        for value, expected in zip(*results, strict=True):
            assert relative(value, expected) < 1e-6
    assert counter.frame_count == 1


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 compiles for each value of a dataclass's fields")
def test_another_seed_is_not_compiled_again():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def layer(x, weight, config, seed):
        return quartet_linear(x, weight, config=config, seed=seed)

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x, weight = torch.randn(40, 64), torch.randn(32, 64)
    found = []
    for number in range(3):
        config, seed = QuartetConfig(seed=number), torch.tensor(make_seed(number))
        results = []
        for function in (layer, compiled):
            z = x.clone().requires_grad_()
            function(z, weight, config, seed).square().sum().backward()
            results.append(z.grad)
        assert relative(*results) < 1e-6
        found.append(results[0])
    assert not torch.equal(found[0], found[1])
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "triton", "bf16", "fp8", "native"])
def test_what_a_compiled_layer_keeps_is_made_before_its_first_run(backend, dtype):
    """The first run of a CUDA graph has memory of its own, in which nothing may live on."""
    torch._dynamo.reset()
    _matrix.cache_clear()
    config = QuartetConfig(transform_init="gsr", hadamard_group_size=64, backend=backend)
    made = []

    def compiler(graph, inputs):
        made.append(_matrix.cache_info().misses)
        return graph.forward

    def layer(x, weight):
        return quartet_linear(x, weight, config=config)

    x, weight = torch.randn(40, 64, dtype=dtype), torch.randn(32, 64, dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    compiled(x.requires_grad_(), weight.requires_grad_()).sum().backward()
    assert made == [_matrix.cache_info().misses]
    assert _matrix.cache_info().hits > 0


@pytest.mark.parametrize("how", ["export", "fake"])
def test_tracers_leave_nothing_behind(how):
    """Not with caches filled: a tracer's tensors must not get into them."""
    weight = torch.randn(64, 64, requires_grad=True)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return quartet_linear(x, weight, config=QuartetConfig(backend="reference"))

    x = torch.randn(4, 64)
    _matrix.cache_clear()
    _constant_seed.cache_clear()
    if how == "export":
        exported = torch.export.export(Layer(), (x,), strict=False).module()
        assert type(exported(x)) is torch.Tensor
    else:
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(x).requires_grad_()
            quartet_linear(fake, mode.from_tensor(weight), config=QuartetConfig(backend="reference")).sum().backward()
            assert fake.grad.shape == x.shape
    y = Layer()(x.requires_grad_())
    y.sum().backward()
    assert type(y.detach()) is type(x.grad) is torch.Tensor


def count_projections(monkeypatch):
    from quartet_kernels import linear

    calls = []
    project = linear._project
    monkeypatch.setattr(linear, "_project", lambda x, config, mask: calls.append(x) or project(x, config, mask))
    return calls


def activation(*shape):
    return torch.randn(*shape).requires_grad_() * 1


def test_layers_that_read_the_same_input_quantise_it_once(monkeypatch):
    calls = count_projections(monkeypatch)
    x, weights = activation(2, 20, 64), [torch.randn(32, 64) for _ in range(3)]
    config = QuartetConfig()
    outputs = [quartet_linear(x, weight, config=config, seed=1) for weight in weights]
    assert sum(tensor is x for tensor in calls) == 1
    assert len(calls) == 4
    for y, weight in zip(outputs, weights, strict=True):
        assert torch.equal(y, quartet_linear(x.detach(), weight, config=config, seed=1))


def test_what_inference_mode_quantised_is_not_taken_for_training():
    x, weight, config = activation(40, 64), torch.randn(32, 64, requires_grad=True), QuartetConfig()
    weight_window.open(1)
    try:
        with torch.inference_mode():
            target = quartet_linear(x, weight, config=config)
        y = quartet_linear(x, weight, config=config)
        assert torch.equal(y, target)
        y.sum().backward()
    finally:
        weight_window.close()


def test_weights_that_are_computed_do_not_pile_up_in_their_window():
    weight_window.open(1)
    try:
        for _ in range(3):
            quartet_linear(torch.ones(32, 64), torch.randn(32, 64, requires_grad=True) * 1, config=QuartetConfig())
        gc.collect()
        assert weight_window._projections == {}
    finally:
        weight_window.close()


def test_a_changed_input_is_quantised_again(monkeypatch):
    calls = count_projections(monkeypatch)
    x, weight = activation(40, 64), torch.randn(32, 64)
    first = quartet_linear(x, weight, config=QuartetConfig(), seed=1)
    x.mul_(-1)
    assert torch.equal(quartet_linear(x, weight, config=QuartetConfig(), seed=1), -first)
    quartet_linear(x, weight, config=QuartetConfig(scale_rule="floor"), seed=1)
    x.data = torch.randn(8, 64)
    assert quartet_linear(x, weight, config=QuartetConfig(scale_rule="floor"), seed=1).shape == (8, 32)
    assert sum(tensor is x for tensor in calls) == 4


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_buffer_that_is_written_without_a_trace_is_quantised_again(mode):
    x, weight = torch.randn(40, 64), torch.randn(32, 64)
    with mode():
        first = quartet_linear(x, weight, config=QuartetConfig())
        x.data.mul_(-1)
        assert torch.equal(quartet_linear(x, weight, config=QuartetConfig()), -first)


def test_the_shared_projection_is_dropped_with_its_input():
    inputs, weight = [activation(40, 64)], torch.randn(32, 64)
    quartet_linear(inputs[0], weight, config=QuartetConfig(), seed=1)
    assert _last_input.kept
    # Autograd's threads drop activations, too.
    thread = threading.Thread(target=inputs.clear)
    thread.start()
    thread.join()
    assert not _last_input.kept


def partitioned(function, graphs):
    """The function, compiled anew; its graphs for forward and backward are cut as Inductor cuts them."""
    torch._dynamo.reset()

    def remember(graph, inputs):
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=remember, partition_fn=min_cut_rematerialization_partition)
    return torch.compile(function, fullgraph=True, backend=backend)


def quantisations(graph):
    return sum(node.target == torch.ops.quartet.quantize_forward.default for node in graph.nodes)


def test_compiled_layers_that_read_the_same_input_quantise_it_once():
    weights = [torch.randn(32, 64) for _ in range(3)]
    graphs = []

    def layers(x):
        return [quartet_linear(x, weight, config=QuartetConfig()) for weight in weights]

    partitioned(layers, graphs)(torch.randn(40, 64, requires_grad=True))
    assert quantisations(graphs[0]) == 4


@pytest.mark.parametrize("checkpointed", [False, True])
def test_inputs_are_quantised_again_instead_of_kept(checkpointed):
    """In a gated block: two layers read a norm's output, the third a product of theirs."""
    gate, up, down = (torch.randn(64, 64, requires_grad=True) for _ in range(3))
    x = torch.randn(40, 64)
    found, kept, calls = [], [], []

    def block(z, config):
        z = torch.nn.functional.rms_norm(z, (64,))
        gated = torch.nn.functional.silu(quartet_linear(z, gate, config=config)) * quartet_linear(z, up, config=config)
        return quartet_linear(gated, down, config=config)

    def whole(z, config):
        return checkpoint(block, z, config, use_reentrant=False) if checkpointed else block(z, config)

    for compiled, again in itertools.product((False, True), repeat=2):
        graphs = []
        function = partitioned(whole, graphs) if compiled else block
        z = x.clone().requires_grad_()
        y = function(z, QuartetConfig(recompute_inputs=again))
        found.append((y, *torch.autograd.grad(y.square().sum(), (z, gate, up, down))))
        if compiled:
            calls.append(list(map(quantisations, graphs)))
            outputs = list(graphs[0].nodes)[-1].args[0]
            saved = [node.meta["val"] for node in outputs if isinstance(node, torch.fx.Node)]
            kept.append(sum(t.nbytes for t in saved if t.dtype in (torch.uint8, torch.int32) and t.shape[0] == 40))
    for results in found[1:]:
        for value, expected in zip(results, found[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=0)
    codes = 2 * 40 * (32 + 2 + 8)  # and scales and masks, of two inputs
    assert kept[1] == 0
    if not checkpointed:
        assert kept[0] == codes
        assert calls == [[5, 0], [5, 2]]


def test_inputs_that_are_data_or_of_frozen_weights_are_not_quantised_again():
    config, weight = QuartetConfig(recompute_inputs=True), torch.randn(64, 64, requires_grad=True)

    def layer(x, weight):
        y = quartet_linear(x, weight, config=config)
        x.mul_(2)  # as who loads the next batch into the same tensor
        return y

    gradients = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        torch._dynamo.reset()
        (gradient,) = torch.autograd.grad(function(torch.ones(40, 64), weight).sum(), weight)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)

    graphs = []

    def frozen(x):
        return quartet_linear(torch.nn.functional.rms_norm(x, (64,)), weight.detach(), config=config)

    partitioned(frozen, graphs)(torch.randn(40, 64, requires_grad=True)).sum().backward()
    assert list(map(quantisations, graphs)) == [2, 0]


def test_a_layer_that_would_quantise_again_can_be_exported():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(32, 64))

        def forward(self, x):
            x = torch.nn.functional.rms_norm(x * self.weight.sum(), (64,))
            return quartet_linear(x, self.weight, config=QuartetConfig(recompute_inputs=True))

    torch._dynamo.reset()
    layer, x = Layer(), torch.randn(40, 64)
    torch.testing.assert_close(torch.export.export(layer, (x,), strict=True).module()(x), layer(x))


@pytest.mark.parametrize("argument", [False, True])
def test_sizes_may_be_dynamic_and_the_configuration_a_variable(argument):
    config, weight = QuartetConfig(), torch.randn(32, 64)

    def layer(x, given=None):
        return quartet_linear(x, weight, config=given or config)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (8, 16, 40):
        x = torch.randn(tokens, 64)
        torch.testing.assert_close(compiled(x, config) if argument else compiled(x), layer(x))


def test_a_weight_is_quantised_once_while_its_window_is_open(monkeypatch):
    calls = count_projections(monkeypatch)
    weight = torch.randn(32, 64, requires_grad=True)

    def forward():
        return quartet_linear(torch.ones(32, 64), weight, config=QuartetConfig(), seed=1)

    def quantised():
        return sum(tensor is weight for tensor in calls)

    weight_window.open(7)
    try:
        first = forward()
        first.sum().backward()
        assert torch.equal(forward(), first)
        weight_window.open(7)
        forward()
        assert quantised() == 1
        with torch.no_grad():
            weight.mul_(-1)  # an optimizer's step
            assert torch.equal(forward(), -first)
        assert quantised() == 2
        weight_window.open(8)
        forward()
        assert quantised() == 3
    finally:
        weight_window.close()
    forward()
    forward()
    assert quantised() == 5
