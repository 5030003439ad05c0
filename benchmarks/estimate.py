"""What forward and backward of one linear would take at a GPU's peaks: an estimate from data sheets, nothing measured.

    python benchmarks/estimate.py        # the table of docs/hardware.md

Kernels follow one another, each as long as the longer of its arithmetic and of its bytes, every byte moved once. Real
kernels reach a part of both.
"""

import sys
from typing import NamedTuple

SHAPES = ((16384, 4096, 14336), (16384, 4096, 4096), (8192, 8192, 8192))
"""Tokens x in_features x out_features, those of BENCHMARKS.md."""


class Gpu(NamedTuple):
    """Peaks for dense products with float32 sums, in PFLOP/s, and bandwidth in TB/s, of the maker's data sheet."""

    name: str
    backend: str
    bandwidth: float
    bf16: float
    fp8: float = 0.0
    fp4: float = 0.0


GPUS = (
    Gpu("B200", "native", 7.7, 2.25, 4.5, 9.0),
    Gpu("B300", "native", 8.0, 2.25, 4.5, 9.0),
    Gpu("RTX 5090", "native", 1.79, 0.2095, 0.419, 1.676),
    Gpu("MI355X", "native", 8.0, 2.5, 5.0, 10.1),
    Gpu("H200 SXM", "fp8", 4.8, 0.989, 1.979),
    Gpu("H100 SXM", "fp8", 3.35, 0.989, 1.979),
    Gpu("RTX 4090", "fp8", 1.01, 0.165, 0.330),
    Gpu("A100 SXM 80 GB", "bf16", 2.04, 0.312),
    Gpu("MI300X", "triton", 5.3, 1.307),
)
PACKED = 17 / 32
"""Bytes an element of codes and scales."""
MASK = 1 / 8
MXFP8 = 33 / 32


def linear(gpu: Gpu, shape: tuple[int, int, int]) -> float:
    """Milliseconds of `nn.Linear` in bfloat16: three products."""
    tokens, inputs, outputs = shape
    moved = 2 * (tokens * inputs + inputs * outputs + tokens * outputs)
    return 3 * 1e3 * max(2 * tokens * inputs * outputs / (gpu.bf16 * 1e15), moved / (gpu.bandwidth * 1e12))


def quartet(gpu: Gpu, shape: tuple[int, int, int], backward: str = "mxfp4") -> float:
    """Milliseconds of the layer with `backward_dtype`, bfloat16 outside."""
    tokens, inputs, outputs = shape
    x, w, y = tokens * inputs, inputs * outputs, tokens * outputs
    flop = 2.0 * tokens * inputs * outputs
    rate, width = {
        "native": (gpu.fp4, PACKED),
        "fp8": (gpu.fp8, 1),
        "bf16": (gpu.bf16, 2),
        "triton": (gpu.bf16, PACKED),
    }[gpu.backend]
    # Packed codes on the way to the operand: FP8 is made of codes, except where a gradient's rows give it at once.
    by_way = 2 * PACKED if gpu.backend == "fp8" else 0
    kept = 0 if gpu.backend in ("native", "triton") else PACKED
    quantised = (2 + kept + MASK + width + (PACKED if gpu.backend == "fp8" else 0)) * (x + w)
    total = max(flop / (rate * 1e15), (width * (x + w) + 2 * y) / (gpu.bandwidth * 1e12))
    if backward == "mxfp4":
        gradients = (2 + width) * y + (2 + by_way + width) * y
        others = (PACKED + by_way + width) * (x + w)
    else:
        native = gpu.backend == "native"
        rate, width = (gpu.fp8, MXFP8) if native else (gpu.bf16, 2)
        gradients, others = 2 * (2 + width) * y, (PACKED + width) * (x + w)
    for other, result in ((w, x), (x, w)):
        last = (MASK + 2) * result
        if width == 2:  # cuBLAS writes float32, and a kernel of its own rotates it back
            total += (last + 4 * result) / (gpu.bandwidth * 1e12)
            last = 4 * result
        total += max(flop / (rate * 1e15), (width * (y + other) + last) / (gpu.bandwidth * 1e12))
    return 1e3 * (total + (quantised + gradients + others) / (gpu.bandwidth * 1e12))


def table() -> str:
    """Markdown: bfloat16, `quartet` and `mxfp8_backward` in ms, and their ratios to bfloat16."""
    names = ["x".join(map(str, shape)) for shape in SHAPES]
    lines = [f"| GPU | backend | {' | '.join(names)} |", f"| --- | --- |{' --- |' * len(names)}"]
    for gpu in GPUS:
        cells = []
        for shape in SHAPES:
            plain, four, eight = linear(gpu, shape), quartet(gpu, shape), quartet(gpu, shape, "mxfp8")
            cells.append(f"{plain:.2f} / {four:.2f} = {four / plain:.2f} / {eight:.2f} = {eight / plain:.2f}")
        lines.append(f"| {gpu.name} | `{gpu.backend}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
