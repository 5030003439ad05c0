"""What runs here and why: versions, devices, the backend of each, and a self-test against the reference."""

import importlib.metadata
import platform
from typing import Any

import torch

from .backends import available_backends, select_backend
from .config import QuartetConfig
from .functional import quantize_mxfp4
from .linear import quartet_linear
from .philox import make_seed

PACKAGES = ("torch", "triton", "lightning", "lightning-quartet", "transformers", "torchmetrics", "safetensors")


def self_test(device: torch.device, backend: str) -> dict[str, float]:
    """Largest relative differences (Frobenius) from the reference: of a quantised tensor, an output and gradients."""
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(*shape, generator=generator) for shape in ((96, 128), (64, 128), (96, 64)))
    results = []
    for name, where in (("reference", torch.device("cpu")), (backend, device)):
        a, w = (tensor.to(where, copy=True).requires_grad_() for tensor in (x, weight))
        config = QuartetConfig(backend=name)  # type: ignore[arg-type]
        y = quartet_linear(a, w, config=config, seed=torch.tensor(make_seed(1), device=where))
        y.backward(dy.to(where))
        quantised = quantize_mxfp4(x.to(where), backend=name).dequantize()  # type: ignore[union-attr]
        results.append([tensor.detach().cpu().double() for tensor in (quantised, y, a.grad, w.grad)])  # type: ignore[union-attr]
    names = ("quantize", "forward", "input gradient", "weight gradient")
    return {
        name: float((value - expected).norm() / expected.norm())
        for name, expected, value in zip(names, *results, strict=True)
    }


def _advice(device: torch.device) -> list[str]:
    """What would be faster, and combinations known to be bad."""
    advice = []
    try:
        importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        advice.append("triton is not installed: only the reference backend runs; install triton on Linux.")
    if device.type == "cpu":
        if torch.version.cuda is None and torch.version.hip is None:
            advice.append("this torch is built without GPU support; a CUDA build uses the GPU kernels.")
        elif not torch.cuda.is_available():
            advice.append("torch finds no GPU; check the driver with nvidia-smi.")
        return advice
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        advice.append(
            f"compute capability {capability[0]}.{capability[1]} has no bfloat16 tensor cores: training is slow."
        )
    elif capability < (8, 9):
        advice.append(
            "this GPU has no FP8 tensor cores: products run in bfloat16, so training is not faster than bf16."
        )
    native = available_backends(device)["native"]
    if "needs triton" in native:
        advice.append(f"this GPU has FP4 units, which are left alone: backend 'native' {native}.")
    return advice


def run() -> dict[str, Any]:
    """The report: ``versions``, ``devices`` (name, backend, reasons, self-test), ``advice`` and ``ok``."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    devices = [torch.device("cpu")] + [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    report: dict[str, Any] = {"versions": versions, "devices": [], "advice": _advice(devices[-1]), "ok": True}
    for device in devices:
        entry: dict[str, Any] = {
            "device": str(device),
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "backend": "none",
            "backends": available_backends(device),
        }
        try:
            entry["backend"] = backend = select_backend("auto", device, torch.bfloat16).name
            differences = self_test(device, backend)
            # A code in 1e5 may differ by a step on a GPU, where sums run in another order.
            passed = all(value < 2e-3 for value in differences.values())
            entry["self-test"] = {"passed": passed, **differences}
        except Exception as error:  # whatever a driver or compiler raises is the answer
            entry["self-test"] = {"passed": False, "error": f"{type(error).__name__}: {error}"}
        report["ok"] = report["ok"] and entry["self-test"]["passed"]
        report["devices"].append(entry)
    return report


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [", ".join(f"{name} {version}" for name, version in report["versions"].items())]
    for entry in report["devices"]:
        lines += ["", f"{entry['device']} ({entry['name']}): backend {entry['backend']}"]
        lines += [f"  {name:<10} {reason}" for name, reason in entry["backends"].items()]
        result = dict(entry["self-test"])
        passed = result.pop("passed")
        details = ", ".join(f"{k} {v:.1e}" if isinstance(v, float) else str(v) for k, v in result.items())
        lines.append(f"  self-test  {'passed' if passed else 'FAILED'} ({details})")
    if report["advice"]:
        lines += ["", *(f"- {line}" for line in report["advice"])]
    return "\n".join(lines)
