"""The one place that decides which backend runs on a device, why, and what is missing."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference

BACKEND_VARIABLE = "QUARTET_BACKEND"
"""An environment variable that overrides ``backend="auto"``."""


@dataclass(frozen=True)
class Backend:
    """Functions with one signature, see :mod:`quartet_kernels.reference` for what each computes."""

    name: str
    quantize_forward: Callable
    quantize_backward: Callable
    requantize: Callable
    expand: Callable
    matmul: Callable
    matmul_bf16: Callable
    unrotate: Callable
    empty_operand: Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
    """(any tensor of the device, rows, elements a row) -> an uninitialised operand; says its shapes and dtypes."""
    packed: bool = False
    """Operands are the packed codes and scales themselves."""


def _reference_operand(x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(rows, columns, dtype=dtype), x.new_empty(0, dtype=torch.float32)


REFERENCE = Backend(
    name="reference",
    quantize_forward=reference.quantize_forward,
    quantize_backward=reference.quantize_backward,
    requantize=reference.requantize,
    expand=reference.expand,
    matmul=reference.matmul,
    matmul_bf16=reference.matmul_bf16,
    unrotate=reference.unrotate,
    empty_operand=_reference_operand,
)


def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "needs the package triton, which is not installed"


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter (``TRITON_INTERPRET=1``, for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def load_backend(name: str) -> Backend:
    """The backend of that name, whether or not a device here can run it.

    Raises:
        ValueError: If there is none.
        RuntimeError: If the packages that it needs are not installed.
    """
    if name == "reference":
        return REFERENCE
    if name not in _REQUIREMENTS:
        raise ValueError(f"There is no backend {name!r}; choose one of {', '.join(map(repr, available_backends()))}.")
    if missing := _triton_missing():
        raise RuntimeError(f"Backend {name!r} {missing}; install triton or choose backend='reference'.")
    return importlib.import_module(".triton.backend", __package__).make_backend(name)


def _capability(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability; None where there is none (CPU, AMD)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def _needs_cuda(device: torch.device, minimum: tuple[int, int], what: str) -> str | None:
    capability = _capability(device)
    if interpreting() and device.type == "cpu":
        return None
    if capability is None:
        return f"needs {what}, and {device.type} is not one"
    if capability < minimum:
        return f"needs {what}, and this GPU has compute capability {capability[0]}.{capability[1]}"
    return None


def _fp8_missing(device: torch.device) -> str | None:
    missing = _needs_cuda(device, (8, 9), "a GPU with FP8 tensor cores (compute capability 8.9 or 9.0)")
    capability = _capability(device)
    if missing is None and capability is not None and capability >= (10, 0):
        return "is for GPUs without FP4 units; this one has them: use backend 'native'"
    return missing


_REQUIREMENTS: dict[str, Callable[[torch.device], str | None]] = {
    "triton": lambda device: _needs_cuda(device, (8, 0), "a CUDA GPU of compute capability 8.0 or newer"),
    "bf16": lambda device: _needs_cuda(device, (8, 0), "a CUDA GPU of compute capability 8.0 or newer"),
    "fp8": _fp8_missing,
}


def _missing(name: str, device: torch.device) -> str | None:
    if name == "reference":
        return None
    return _triton_missing() or _REQUIREMENTS[name](device)


def available_backends(device: torch.device | str | None = None) -> dict[str, str]:
    """Each backend's name and the reason why it can or cannot run on a device (the first GPU, or else the CPU)."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    automatic = select_backend("auto", device, torch.bfloat16).name
    reasons = {}
    for name in ("reference", *_REQUIREMENTS):
        missing = _missing(name, device)
        chosen = f"; chosen for {device.type}" if name == automatic else ""
        reasons[name] = f"cannot run: it {missing}" if missing else f"can run{chosen}"
    return reasons


@functools.lru_cache(maxsize=256)
def _automatic(device: torch.device) -> str:
    for name in ("fp8", "bf16"):
        if device.type != "cpu" and name in _REQUIREMENTS and _missing(name, device) is None:
            return name
    return "reference"


def select_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that runs tensors of a dtype on a device; ``"auto"`` is the fastest, or the reference for float64.

    Raises:
        ValueError: If there is no such backend.
        RuntimeError: If the backend that was asked for cannot run there.
    """
    if name == "auto":
        name = os.environ.get(BACKEND_VARIABLE, "") or "auto"
    if name == "auto":
        return REFERENCE if dtype == torch.float64 else load_backend(_automatic(device))
    backend = load_backend(name)
    if missing := _missing(name, device):
        raise RuntimeError(f"Backend {name!r} cannot run on {device}: it {missing}; use backend='auto'.")
    if dtype == torch.float64 and name != "reference":
        raise RuntimeError(f"Backend {name!r} has no float64; use float32 tensors or backend='reference'.")
    return backend
