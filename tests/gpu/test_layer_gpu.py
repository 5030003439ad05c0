"""The layer on a GPU: no host synchronisation, CUDA graphs, compilation, threads, many tokens, odd views."""

import threading

import pytest
import torch
from torch import Tensor

from quartet_kernels import QuartetConfig, available_backends, backends, quartet_linear
from quartet_kernels.philox import make_seed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

BACKENDS = (
    [name for name, reason in available_backends("cuda").items() if reason.startswith("can run")][1:]
    if torch.cuda.is_available()
    else ["fp8"]
)


def tensors(tokens: int = 512, inputs: int = 512, outputs: int = 256, dtype: torch.dtype = torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(tokens + inputs)
    x, weight, bias, dy = (
        torch.randn(*shape, generator=generator, device="cuda").to(dtype)
        for shape in ((tokens, inputs), (outputs, inputs), (outputs,), (tokens, outputs))
    )
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), dy


def step(
    x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, config: QuartetConfig, seed: Tensor | int
) -> list[Tensor]:
    x.grad = weight.grad = bias.grad = None
    y = quartet_linear(x, weight, bias, config=config, seed=seed)
    y.backward(dy)
    return [y.detach(), x.grad, weight.grad, bias.grad]


def seed_tensor(number: int) -> Tensor:
    return torch.tensor(make_seed(3, 1, number), device="cuda")


@pytest.mark.parametrize(
    "options",
    [{}, {"backward_rounding": "stochastic"}, {"backward_dtype": "bf16"}, {"backward_dtype": "mxfp8"}],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_host_synchronisation_and_the_same_bits_every_time(backend, options):
    arguments, seed = tensors(), seed_tensor(0)
    config = QuartetConfig(backend=backend, **options)
    first = step(*arguments, config, seed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [step(*arguments, config, seed) for _ in range(3)]
        seed[1] += 1
        other = step(*arguments, config, seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for results in again:
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))
    assert torch.equal(first[0], other[0])
    if "backward_dtype" not in options:
        assert not torch.equal(first[2], other[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_graph_replays_draw_new_signs_and_bits_with_the_step(backend):
    arguments, seed = tensors(), seed_tensor(0)
    config = QuartetConfig(backend=backend, backward_rounding="stochastic")
    eager = []
    for number in range(2):
        seed[1] = number
        eager.append([tensor.clone() for tensor in step(*arguments, config, seed)])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(*arguments, config, seed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*arguments, config, seed)
    for number in range(2):
        seed[1] = number
        graph.replay()
        for value, expected in zip(captured, eager[number], strict=True):
            assert torch.equal(value, expected)
    assert not torch.equal(eager[0][2], eager[1][2])


def test_a_seed_that_is_no_tensor_is_refused_in_capture():
    x, weight, bias, _ = tensors()
    step(x, weight, bias, torch.ones(512, 256, device="cuda"), QuartetConfig(), 1)
    with pytest.raises(RuntimeError, match="pass seed as an int64"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        quartet_linear(x, weight, bias, config=QuartetConfig(), seed=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager_without_recompilation(backend):
    torch._dynamo.reset()
    x, weight, bias, dy = tensors(dtype=torch.float32)
    config = QuartetConfig(backend=backend)

    def layer(x: Tensor, seed: Tensor) -> Tensor:
        # An activation that compilation does not round in another way: a last bit of dy can turn a code.
        return torch.relu(quartet_linear(x, weight, bias, config=config, seed=seed))

    compiled = torch.compile(layer, fullgraph=True)
    results: list[list[Tensor]] = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(20):
            results = []
            for function in (layer, compiled):
                x.grad = weight.grad = bias.grad = None
                y = function(x, seed_tensor(number))
                y.backward(dy)
                results.append([y.detach(), x.grad, weight.grad, bias.grad])
            for value, expected in zip(*results, strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_twenty_token_counts_compile_at_most_three_variants_of_a_kernel():
    from triton.runtime.jit import JITFunction

    from quartet_kernels.triton import expand, fp8_matmul, matmul, quantize, requantize

    def variants() -> dict[str, int]:
        found = {}
        for module in (expand, fp8_matmul, matmul, quantize, requantize):
            for name, value in vars(module).items():
                if isinstance(value, JITFunction):
                    found[name] = sum(len(cache[0]) for cache in value.device_caches.values())
        return found

    config = QuartetConfig()
    before = variants()
    for tokens in [1, 2, 3, 16, 17, 31, 32, 33, 48, 64, 100, 127, 128, 129, 250, 256, 500, 1000, 1024, 2047]:
        x, weight, bias, dy = tensors(tokens, 224, 352)
        step(x, weight, bias, dy, config, seed_tensor(0))
    # One layer uses a kernel for three products, or four operands; each may have three variants.
    uses = {"quantize_rows_kernel": 3, "expand_kernel": 6, "fp8_tma_kernel": 3, "fp8_pointer_kernel": 3}
    uses["requantize_kernel"] = 4  # for two products, and once more to check
    for name, count in variants().items():
        assert count - before.get(name, 0) <= 3 * uses.get(name, 1), name


def test_two_models_in_two_threads_do_not_disturb_each_other():
    configs = [QuartetConfig(), QuartetConfig(backward_rounding="stochastic", hadamard_group_size=64)]
    arguments = [tensors(), tensors(384, 256, 512)]
    expected = [step(*a, c, seed_tensor(1)) for a, c in zip(arguments, configs, strict=True)]
    torch.cuda.synchronize()
    failures: list[object] = []

    def work(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    values = step(*arguments[index], configs[index], seed_tensor(1))
                    torch.cuda.current_stream().synchronize()
                    if not all(torch.equal(a, b) for a, b in zip(values, expected[index], strict=True)):
                        failures.append(index)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("backend", BACKENDS)
def test_unaligned_views(backend):
    config = QuartetConfig(backend=backend)
    x, weight, bias, dy = tensors(129, 96, 160)
    aligned = step(x, weight, bias, dy, config, seed_tensor(0))

    def shifted(tensor: Tensor) -> Tensor:
        storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")
        view = storage[1:].view(tensor.shape)
        view.copy_(tensor.detach())
        return view.requires_grad_()

    values = step(shifted(x), shifted(weight), shifted(bias), shifted(dy).detach(), config, seed_tensor(0))
    assert all(torch.equal(a, b) for a, b in zip(values, aligned, strict=True))


def test_more_than_two_to_the_31_elements():
    tokens, inputs, outputs = 2**31 // 4096 + 96, 4096, 64
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(tokens, outputs, device="cuda", dtype=torch.bfloat16)
    config = QuartetConfig(randomize_backward=False)
    y = quartet_linear(x, weight, config=config)
    y.backward(dy)
    tail = x[-128:].detach().requires_grad_()
    z = quartet_linear(tail, weight, config=config)
    assert torch.equal(y[-128:], z)
    z.backward(dy[-128:])
    assert torch.equal(x.grad[-128:], tail.grad)
    exact = torch.zeros(outputs, inputs, device="cuda")
    for rows in range(0, tokens, 1 << 16):
        exact += dy[rows : rows + (1 << 16)].float().T @ x[rows : rows + (1 << 16)].detach().float()
    assert ((weight.grad.float() - exact).norm() / exact.norm()).item() < 0.3


@pytest.mark.parametrize("options", [{}, {"backward_dtype": "mxfp8"}, {"backward_rounding": "stochastic"}], ids=str)
@pytest.mark.parametrize("tiled", [False, True], ids=["scales by rows", "tiled scales"])
def test_native_by_decomposition(tiled, options, monkeypatch):
    """Where there are no FP4 units Triton multiplies in bfloat16, which gives the same numbers; tiled scales by TMA."""
    from quartet_kernels.triton import backend, mxfp8, quantize

    if tiled and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs TMA")
    monkeypatch.setitem(backends._REQUIREMENTS, "native", lambda device: None)
    for module in (backend, mxfp8, quantize):
        monkeypatch.setattr(module, "tiles_scales", lambda device: tiled)
    arguments = tensors(tokens=300, inputs=416, dtype=torch.float32)
    results = [
        step(*arguments, QuartetConfig(backend=name, **options), seed_tensor(0)) for name in ("native", "reference")
    ]
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).norm() < 2e-3 * expected.norm()
