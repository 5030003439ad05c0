"""Every backend computes the layer that the reference defines: forward, both gradients, packed weights."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quartet_kernels import QuartetConfig, available_backends, doctor, mxfp4_matmul, quantize_mxfp4, quartet_linear
from quartet_kernels.philox import make_seed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name, reason in available_backends(DEVICE).items() if reason.startswith("can run")]
CONFIGS = [
    {},
    {"backward_rounding": "stochastic", "hadamard_group_size": 64},
    {"forward_method": "abs_max", "transform_init": "gsr"},
    {"backward_dtype": "bf16", "hadamard_group_size": 128},
    {"backward_dtype": "mxfp8", "hadamard_group_size": 64},
    {"backward_dtype": "mxfp8", "forward_method": "abs_max", "transform_init": "identity"},
    {"transform_init": "identity", "statistic": "std", "scale_rule": "floor", "accumulation": "precise"},
]


def relative(value, expected):
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


def results(backend, options, shape, dtype=torch.float32):
    tokens, inputs, outputs = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x, weight, dy, bias = (
        torch.randn(*size, generator=generator).to(DEVICE, dtype)
        for size in ((tokens, inputs), (outputs, inputs), (tokens, outputs), (outputs,))
    )
    x[:, 3] *= 20
    tensors = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    config = QuartetConfig(backend=backend, **options)
    seed = torch.tensor(make_seed(5, 3, 7), device=DEVICE)
    y = quartet_linear(*tensors, config=config, seed=seed)
    y.backward(dy)
    packed = quartet_linear(x.detach(), quantize_mxfp4(weight, config=config, backend=backend), bias, config=config)
    return y.detach(), *(tensor.grad for tensor in tensors), packed.detach()


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU runs only some of them")
def test_the_interpreter_offers_every_backend():
    assert set(BACKENDS) == {"reference", "triton", "fp8", "bf16", "native"}


@pytest.mark.parametrize("options", CONFIGS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_equals_the_reference(backend, options):
    shape = (70, 128, 96)
    for name, value, expected in zip(
        ("y", "dx", "dw", "db", "packed"),
        results(backend, options, shape),
        results("reference", options, shape),
        strict=True,
    ):
        # On a GPU rotations sum in another order, so a code in 1e5 may differ by a step; FP8 accumulates in fewer bits.
        assert relative(value, expected) < (2e-3 if DEVICE == "cuda" else 1e-5), name


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_sixteen_bit_tensors(backend):
    for dtype in (torch.bfloat16, torch.float16):
        for value, expected in zip(
            results(backend, {}, (33, 64, 32), dtype), results("reference", {}, (33, 64, 32), dtype), strict=True
        ):
            assert value.dtype == dtype
            assert relative(value, expected) < 2**-8


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_tokens(backend):
    x = torch.empty(0, 64, device=DEVICE, requires_grad=True)
    weight = torch.randn(32, 64, device=DEVICE, requires_grad=True)
    for backward_dtype in ("mxfp4", "mxfp8", "bf16"):
        config = QuartetConfig(backend=backend, backward_dtype=backward_dtype)
        quartet_linear(x, weight, config=config).sum().backward()
        assert x.grad.shape == (0, 64)
        assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_non_contiguous_input(backend):
    x, dy = torch.randn(64, 40, device=DEVICE).t(), torch.randn(32, 40, device=DEVICE).t()
    weight = torch.randn(64, 32, device=DEVICE).t()
    outputs = []
    for tensors in ((x, weight, dy), (x.contiguous(), weight.contiguous(), dy.contiguous())):
        a, b = (tensor.detach().requires_grad_() for tensor in tensors[:2])
        y = quartet_linear(a, b, config=QuartetConfig(backend=backend), seed=1)
        y.backward(tensors[2])
        outputs.append((y, a.grad, b.grad))
    for first, second in zip(*outputs, strict=True):
        assert torch.equal(first, second)


def strided(tensor):
    """The same values with gaps between them."""
    return torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1)[..., 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_vectors_and_gradients(backend):
    config = QuartetConfig(backend=backend)
    x, weight, dy = (torch.randn(*size, device=DEVICE) for size in ((40, 64), (32, 64), (40, 32)))
    bias = torch.randn(32, device=DEVICE)
    signs = tuple(torch.randint(0, 2, (32,), device=DEVICE) * 2.0 - 1 for _ in range(2))
    outputs = []
    for make in (torch.clone, strided):
        a, b = (tensor.clone().requires_grad_() for tensor in (x, weight))
        y = quartet_linear(a, b, make(bias), config=config, signs=tuple(map(make, signs)))
        y.backward(make(dy))
        packed = quantize_mxfp4(weight, config=config, backend=backend)
        few = quartet_linear(x[:3], packed, make(bias), config=config)
        backward = quantize_mxfp4(dy, config=config, mode="backward", signs=make(signs[0]), backend=backend)
        outputs.append((y, a.grad, b.grad, few, backward.codes))
    for first, second in zip(*outputs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_float32_sums_alone(backend):
    a, b = (quantize_mxfp4(torch.randn(64, 128, device=DEVICE), backend=backend) for _ in range(2))
    expected = mxfp4_matmul(a, b, out_dtype=torch.float32, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(mxfp4_matmul(a, b, out_dtype=torch.float32, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_device_does_not_matter(backend):
    inverse_root = pytest.importorskip("quartet_kernels.triton.quantize").inverse_root
    inverse_root.cache_clear()
    x = torch.randn(4, 32, device=DEVICE)
    with torch.device("meta"):
        packed = quantize_mxfp4(x, mode="backward", backend=backend)
    assert torch.equal(packed.codes, quantize_mxfp4(x, mode="backward", backend=backend).codes)


def test_the_environment_asks_for_a_backend_that_cannot_run(monkeypatch):
    monkeypatch.setenv("QUARTET_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="QUARTET_BACKEND is 'nonsense'; choose one of 'reference', 'native'"):
        quantize_mxfp4(torch.zeros(1, 32))
    assert set(available_backends("cpu")) >= set(BACKENDS)
    monkeypatch.setenv("QUARTET_BACKEND", "fp8")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="'fp8' cannot run on cpu.*; unset QUARTET_BACKEND"):
        quantize_mxfp4(torch.zeros(1, 32))
    report = doctor.run()
    assert not report["ok"]
    assert "unset QUARTET_BACKEND" in report["devices"][0]["self-test"]["error"]


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_packed_matmul(backend):
    a, b = torch.randn(33, 96, device=DEVICE), torch.randn(64, 96, device=DEVICE)
    packed = [quantize_mxfp4(tensor, backend=backend) for tensor in (a, b)]
    expected = packed[0].dequantize(torch.float64) @ packed[1].dequantize(torch.float64).T
    assert relative(mxfp4_matmul(*packed, out_dtype=torch.float32, backend=backend), expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_operators_say_the_shapes_of_every_backends_operands(backend):
    config = QuartetConfig(backend=backend).text
    x = torch.randn(150, 96, device=DEVICE)
    codes, scales, *_ = torch.ops.quartet.quantize_forward(x, config, False)
    calls = {"quantize_forward": (x, config, True), "expand": (codes, scales, torch.float32, config)}
    for name, arguments in calls.items():
        operator = getattr(torch.ops.quartet, name)
        with FakeTensorMode() as mode:
            fake = operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        for expected, value in zip(operator(*arguments), fake, strict=True):
            assert (expected.shape, expected.dtype) == (value.shape, value.dtype), name
