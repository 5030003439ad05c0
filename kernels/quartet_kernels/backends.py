"""The one place that decides which backend runs on a device, why, and what is missing."""

import functools
import importlib
import importlib.metadata
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
    """Functions with one signature, see `quartet_kernels.reference` for what each computes."""

    name: str
    quantize_forward: Callable
    quantize_backward: Callable
    requantize: Callable
    expand: Callable
    matmul: Callable
    matmul_bf16: Callable
    matmul_mxfp8: Callable
    unrotate: Callable
    empty_operand: Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
    """(any tensor of the device, rows, elements a row) -> an uninitialised operand; says its shapes and dtypes."""
    packed: bool = False
    """Operands are packed codes and their scales, which may be laid out in another way than they are kept."""


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
    matmul_mxfp8=reference.matmul_mxfp8,
    unrotate=reference.unrotate,
    empty_operand=_reference_operand,
)


def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "needs the package triton, which is not installed"


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter (``TRITON_INTERPRET=1``, for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _check_name(name: str, wrong: str = "There is no backend {!r}") -> None:
    names = ("reference", *_REQUIREMENTS)
    if name not in names:
        raise ValueError(f"{wrong.format(name)}; choose one of {', '.join(map(repr, names))}.")


@functools.cache
def load_backend(name: str) -> Backend:
    """The backend of that name, whether or not a device here can run it.

    Raises:
        ValueError: If there is none.
        RuntimeError: If the packages that it needs are not installed.
    """
    if name == "reference":
        return REFERENCE
    _check_name(name)
    if missing := _triton_missing():
        raise RuntimeError(f"Backend {name!r} {missing}; install triton or choose backend='reference'.")
    return importlib.import_module(".triton.backend", __package__).make_backend(name)


def _capability(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability; None where there is none (CPU, AMD)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def _amd_architecture(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is None:
        return None
    return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]


@functools.cache
def _triton_version() -> tuple[int, int]:
    major, minor = importlib.metadata.version("triton").split(".")[:2]
    return int(major), int(minor)


def _other_device(device: torch.device, needed: str) -> str:
    capability, architecture = _capability(device), _amd_architecture(device)
    if capability is not None:
        return f"needs {needed}, and this GPU has compute capability {capability[0]}.{capability[1]}"
    return f"needs {needed}, and this GPU is {architecture}" if architecture else f"needs {needed}, not {device.type}"


def _triton_on(device: torch.device) -> str | None:
    if (_capability(device) or (0, 0)) >= (8, 0) or _amd_architecture(device):
        return None
    return _other_device(device, "an AMD GPU or a CUDA GPU of compute capability 8.0 or newer")


def _bf16_on(device: torch.device) -> str | None:
    if (_capability(device) or (0, 0)) >= (8, 0):
        return None
    return _other_device(device, "a CUDA GPU of compute capability 8.0 or newer")


def _fp8_on(device: torch.device) -> str | None:
    if _capability(device) in ((8, 9), (9, 0)):
        return None
    return _other_device(device, "a CUDA GPU with FP8 and without FP4 units (compute capability 8.9 or 9.0)")


def _native_on(device: torch.device) -> str | None:
    capability, architecture = _capability(device), _amd_architecture(device)
    if (capability or (0, 0)) < (10, 0) and architecture != "gfx950":
        return _other_device(device, "FP4 units (compute capability 10.0 or newer, or gfx950)")
    if (capability == (12, 1) or architecture == "gfx950") and _triton_version() < (3, 9):
        return "needs triton 3.9 or newer on this GPU, which earlier versions give no FP4 instructions"
    return None


_REQUIREMENTS: dict[str, Callable[[torch.device], str | None]] = {
    "native": _native_on,
    "fp8": _fp8_on,
    "bf16": _bf16_on,
    "triton": _triton_on,
}
"""Backends other than the reference, the fastest first: what each lacks on a device, or None where it runs."""


def _missing(name: str, device: torch.device) -> str | None:
    if name == "reference":
        return None
    _check_name(name)
    if interpreting() and device.type == "cpu":
        return _triton_missing()
    return _triton_missing() or _REQUIREMENTS[name](device)


def available_backends(device: torch.device | str | None = None) -> dict[str, str]:
    """Each backend's name and the reason why it can or cannot run on a device (the first GPU, or else the CPU).

    Raises:
        RuntimeError: If there is no such device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(f"There is no {device}: this machine has {torch.cuda.device_count()} CUDA or ROCm GPUs.")
    try:
        automatic = select_backend("auto", device, torch.bfloat16).name
    except (RuntimeError, ValueError):  # QUARTET_BACKEND asks for one that cannot run
        automatic = ""
    reasons = {}
    for name in ("reference", *_REQUIREMENTS):
        missing = _missing(name, device)
        chosen = f"; chosen for {device.type}" if name == automatic else ""
        reasons[name] = f"cannot run: it {missing}" if missing else f"can run{chosen}"
    return reasons


@functools.lru_cache(maxsize=256)
def _automatic(device: torch.device) -> str:
    if device.type == "cpu":
        return "reference"
    return next((name for name in _REQUIREMENTS if _missing(name, device) is None), "reference")


def select_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that runs tensors of a dtype on a device; ``"auto"`` is the fastest, or the reference for float64.

    Raises:
        ValueError: If there is no such backend.
        RuntimeError: If the backend that was asked for cannot run there.
    """
    advice = "use backend='auto'"
    if name == "auto" and (name := os.environ.get(BACKEND_VARIABLE, "") or "auto") != "auto":
        advice = f"unset {BACKEND_VARIABLE}"
        _check_name(name, BACKEND_VARIABLE + " is {!r}")
    if name == "auto":
        return REFERENCE if dtype == torch.float64 else load_backend(_automatic(device))
    if missing := _missing(name, device):
        raise RuntimeError(f"Backend {name!r} cannot run on {device}: it {missing}; {advice}.")
    if dtype == torch.float64 and name != "reference":
        raise RuntimeError(f"Backend {name!r} has no float64; use float32 tensors or backend='reference'.")
    return load_backend(name)
