"""Launches without Triton's own binding of arguments hand over what Triton's would."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton.compiler.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from quartet_kernels.triton import launch as launch_module
from quartet_kernels.triton.launch import descriptor, launch

STREAM = 1234
GRID = 7


class Binary(CompiledKernel):
    """A compiled and loaded kernel that records what it is run with."""

    def __init__(self):
        self.module, self.function, self.packed_metadata = object(), 42, (4, 1, 0)
        self.name, self.src, self.calls = "kernel", None, []
        self._run = lambda *arguments: self.calls.append(arguments)

    def __del__(self):
        """Nothing to unload."""


@pytest.fixture
def compiled(monkeypatch):
    """A kernel whose first launch gives a `Binary`."""
    binary = Binary()
    monkeypatch.setattr(launch_module, "PORTABLE", False)
    monkeypatch.setattr(launch_module, "_several_devices", lambda: False)
    monkeypatch.setattr(launch_module, "_compiled", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    first = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: first.append((grid, arguments, options)) or binary

    return SimpleNamespace(kernel=Kernel(), binary=binary, first=first)


def test_later_launches_run_the_binary_as_triton_does(compiled):
    x = torch.zeros(32, 32)
    arguments, constants = (x, descriptor(x, [32, 32]), None, 5, 0.5), (True, 64)
    device = torch.device("cuda", 0)
    for _ in range(2):
        launch(compiled.kernel, device, GRID, arguments, constants, 4, 2)
    assert compiled.first == [((GRID,), (*arguments, *constants), {"num_warps": 4, "num_stages": 2})]
    compiled.binary[GRID, 1, 1](*arguments, *constants, stream=STREAM)
    ours, tritons = compiled.binary.calls
    run, hooks, passed = slice(0, 6), slice(6, 9), slice(9, None)
    assert ours[run] == tritons[run] == (GRID, 1, 1, STREAM, 42, (4, 1, 0))
    assert ours[hooks] == (None, None, None)
    for a, b in zip(ours[passed], tritons[passed], strict=True):
        assert a == b.data_ptr() if isinstance(b, torch.Tensor) else a is b


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_profilers_hear_of_launches(compiled, monkeypatch, hook):
    through_triton = []
    monkeypatch.setattr(
        CompiledKernel, "__getitem__", lambda self, grid: lambda *arguments: through_triton.append((grid, arguments))
    )
    heard = getattr(knobs.runtime, hook)
    listener = lambda metadata: None  # noqa: E731
    heard.add(listener)
    try:
        for _ in range(2):
            launch(compiled.kernel, torch.device("cuda", 0), GRID, (3,), (64,), 4)
    finally:
        heard.remove(listener)
    assert through_triton == [((GRID, 1, 1), (3, 64))]
    assert not compiled.binary.calls


def test_a_hook_may_be_a_plain_function(compiled, monkeypatch):
    monkeypatch.setattr(launch_module.knobs.runtime, "launch_exit_hook", lambda metadata: None, raising=False)
    assert launch_module._hooked()


@pytest.mark.parametrize(
    ("first", "second", "binaries"),
    [(3, 5, 1), (1, 3, 2), (3, 16, 2), (3, 2**31, 2), (None, 3, 2), (0.5, 1.5, 1)],
)
def test_a_binary_serves_the_arguments_that_triton_compiled_it_for(compiled, first, second, binaries):
    for argument in (first, second, first):
        launch(compiled.kernel, torch.device("cuda", 0), GRID, (argument,), (), 4)
    assert len(compiled.first) == binaries


def test_tensors_are_told_apart_by_dtype_and_alignment(compiled):
    x = torch.zeros(64)
    tensors = (x, x[4:], x[1:], x.to(torch.int32), x[1:].to(torch.int32))
    for tensor in tensors:
        launch(compiled.kernel, torch.device("cuda", 0), GRID, (tensor,), (), 4)
    assert len(compiled.first) == 3  # x and x[4:]; x[1:]; int32


@pytest.mark.parametrize(("shape", "block"), [((64, 128), [32, 64]), ((1, 2, 4, 2, 256), [1, 1, 4, 2, 256])])
def test_descriptors_are_those_of_triton(shape, block):
    tensor = torch.zeros(shape, dtype=torch.uint8)
    ours, tritons = descriptor(tensor, block), TensorDescriptor.from_tensor(tensor, block)
    assert type(ours) is TensorDescriptor
    assert ours.base is tritons.base
    for name in ("shape", "strides", "block_shape", "padding"):
        assert getattr(ours, name) == getattr(tritons, name)
    assert getattr(ours, "round_f32_to_tf32", False) is getattr(tritons, "round_f32_to_tf32", False)
