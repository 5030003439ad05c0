"""Kernel launches that cost the host as little as they can.

Triton's own launch binds arguments, builds the text of a cache key, and compares every global that a kernel reads, each
time: some 45 microseconds in a training step, a dozen times for one linear's forward and backward. Here, all that
decides which binary runs is hashed, and only the first launch goes Triton's way; later ones run the binary as
``CompiledKernel.__getitem__`` does, without the record that it makes for profiling hooks where there are none.
"""

import functools
from typing import Any

import torch
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import PORTABLE

_compiled: dict[tuple[Any, ...], Any] = {}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; ``triton.cdiv`` is a function of kernels first, and takes the host ten times as long."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not less than n >= 1."""
    return 1 << (n - 1).bit_length()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; without end on a CPU."""
    return 1 << 30 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _several_devices() -> bool:
    return torch.cuda.device_count() > 1


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether it is a GPU of capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def descriptor(tensor: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """TMA's, for blocks of a contiguous tensor whose base and strides are multiples of 16 bytes."""
    # Not `from_tensor`, whose checks cost more than all the rest, three times a GEMM.
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = tensor, tensor.shape, tensor.stride(), block
    return made


def _hooked() -> bool:
    """Whether a profiler (Proton) wants to hear of launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _specialize(arguments: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """What Triton compiles for (a pointer's type and alignment to 16 bytes, an integer's size, factor 16, and 1), and
    the arguments with addresses in place of tensors: given a tensor, the driver is asked about its address each time.
    """
    kinds: list[Any] = []
    values: list[Any] = []
    for argument in arguments:
        value = argument
        kind = type(argument)
        if argument is None or kind is float:
            kinds.append(None)
        elif kind is int:
            kinds.append(1 if argument == 1 else (argument % 16 == 0, -(2**31) <= argument < 2**31))
        elif kind is TensorDescriptor:
            kinds.append(argument.base.dtype)  # its block follows from the constants
        else:
            value = argument.data_ptr()
            kinds.append(argument.dtype if value % 16 == 0 else (argument.dtype,))
        values.append(value)
    return kinds, values


def launch(
    kernel: Any,
    device: torch.device,
    programs: int,
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    warps: int,
    stages: int = 3,
    dependent: bool = False,
    registers: int | None = None,
) -> None:
    """Launch as many programs of a kernel on the device's current stream.

    Args:
        kernel: A function of ``triton.jit`` whose constexpr parameters come last.
        device: Where its tensors are; it need not be the current one.
        programs: Size of the one-dimensional grid.
        arguments: Tensors, descriptors, integers, floats and None, for its first parameters.
        constants: Values of its constexpr parameters.
        warps, stages: Triton's options ``num_warps`` and ``num_stages``.
        dependent: On Hopper and later, start while the kernel before it ends (programmatic dependent launch); it waits
            where it says so. One of the constants has to say the same.
        registers: How many a thread may have at most on an NVIDIA GPU; as many as the assembler likes if None.
    """
    if PORTABLE:
        kernel[(programs,)](*arguments, *constants, num_warps=warps, num_stages=stages)
        return
    if _several_devices() and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, device, programs, arguments, constants, warps, stages, dependent, registers)
        return
    kinds, values = _specialize(arguments)
    key = (id(kernel), device.index, warps, stages, registers, constants, *kinds)
    found = _compiled.get(key)
    if found is None:
        options = {"num_warps": warps, "num_stages": stages} | ({"launch_pdl": True} if dependent else {})
        options |= {} if registers is None else {"maxnreg": registers}
        _compiled[key] = kernel[(programs,)](*arguments, *constants, **options)
    elif _hooked():
        found[programs, 1, 1](*arguments, *constants)
    else:
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        found.run(programs, 1, 1, stream, found.function, found.packed_metadata, None, None, None, *values, *constants)
