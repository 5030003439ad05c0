"""Where MXFP4 pays: forward + backward of one linear against bfloat16, over numbers of tokens and sizes.

    python benchmarks/crossover.py --json crossover.json
    python benchmarks/crossover.py --plot docs/images/crossover.png --json crossover.json   # of numbers measured before

Two figures for each: as a program launches it, which for small shapes is how long the host takes, and replayed from a
CUDA graph, which leaves the GPU's time. Medians; the L2 cache is emptied before every run.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from triton.testing import do_bench

from quartet_kernels import QuartetConfig
from quartet_kernels.files import replacing
from quartet_kernels.linear import quartet_linear
from quartet_kernels.philox import make_seed

SIZES = ((2048, 2048), (4096, 4096), (4096, 14336))
TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


def graphed(step: Callable[[], Any]) -> Callable[[], None]:
    """The step as a CUDA graph's replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def measure(tokens: int, inputs: int, outputs: int) -> dict[str, Any]:
    """Milliseconds of forward + backward: bfloat16 ``nn.Linear`` and recipe ``quartet``, eager and as graphs."""
    device = torch.device("cuda")
    x = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(tokens, outputs, device=device, dtype=torch.bfloat16)
    linear = nn.Linear(inputs, outputs, bias=False, device=device, dtype=torch.bfloat16)
    seed, config = torch.tensor(make_seed(0), device=device), QuartetConfig()
    layers: dict[str, Callable[[Tensor], Tensor]] = {
        "bf16": linear,
        "quartet": lambda t: quartet_linear(t, linear.weight, config=config, seed=seed),
    }
    row: dict[str, Any] = {"tokens": tokens, "in": inputs, "out": outputs}
    for name, layer in layers.items():

        def step(layer: Callable[[Tensor], Tensor] = layer) -> Any:
            return torch.autograd.grad(layer(x), (x, linear.weight), dy)

        row[f"{name} ms"] = do_bench(step, warmup=20, rep=60, return_mode="median")
        row[f"{name} graph ms"] = do_bench(graphed(step), warmup=10, rep=40, return_mode="median")
    return row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time against tokens, a panel a size."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SIZES), figsize=(4 * len(SIZES), 3.4), constrained_layout=True)
    for axis, (inputs, outputs) in zip(axes, SIZES, strict=True):
        chosen = [row for row in rows if (row["in"], row["out"]) == (inputs, outputs)]
        tokens = [row["tokens"] for row in chosen]
        for name, colour in (("bf16", "tab:gray"), ("quartet", "tab:blue")):
            axis.plot(tokens, [row[f"{name} ms"] for row in chosen], color=colour, label=f"{name}, eager")
            graph = [row[f"{name} graph ms"] for row in chosen]
            axis.plot(tokens, graph, color=colour, linestyle="--", label=f"{name}, CUDA graph")
        axis.set(xscale="log", yscale="log", title=f"{inputs} to {outputs} features", xlabel="tokens")
        axis.set_xticks(tokens, [f"{n // 1024}k" if n >= 1024 else str(n) for n in tokens])
        axis.minorticks_off()
    axes[0].set_ylabel("forward + backward, ms")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="the numbers: written, or read with --plot")
    parser.add_argument("--plot", type=Path, help="draw the numbers to this file")
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(options.json.read_text()), options.plot)
        return
    rows = []
    for inputs, outputs in SIZES:
        for tokens in TOKENS:
            rows.append(measure(tokens, inputs, outputs))
            print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    with replacing(options.json) as path:
        path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
