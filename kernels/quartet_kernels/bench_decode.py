"""Measures a layer with packed weights on a few tokens next to a bfloat16 ``nn.Linear``, both in CUDA graphs."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .config import QuartetConfig
from .functional import quantize_mxfp4
from .linear import _project
from .mxfp4 import MXFP4Tensor
from .ops import forward_factor

SHAPES = ((8192, 8192), (14336, 4096), (4096, 14336))
"""(out_features, in_features)."""
TOKENS = (1, 8, 16, 32)
COPIES = 4
"""Weights in rotation: one packed weight alone would stay in the L2 cache."""


def decode(
    shapes: tuple[tuple[int, int], ...] = SHAPES, tokens: tuple[int, ...] = TOKENS, copies: int = COPIES
) -> list[dict[str, Any]]:
    """Microseconds a call, activations quantised anew in each: bfloat16 linear, packed weights by the kernel for few
    tokens (``decode us``, of which ``product us`` without the quantisation) and by the GEMM path (``gemm us``).

    Args:
        shapes: (out_features, in_features) of the layers.
        tokens: Numbers of tokens.
        copies: Weights in rotation, at least 4.

    Returns:
        A row for each shape and number of tokens; ``speed-up`` is bfloat16 over decode.

    Raises:
        RuntimeError: If there is no CUDA GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("The decoding benchmark replays CUDA graphs; run it on a machine with a CUDA GPU.")
    from .triton.decode import quantize_few

    device, config = torch.device("cuda"), QuartetConfig()
    rows = []
    for n, k in shapes:
        dense = [torch.randn(n, k, device=device, dtype=torch.bfloat16) for _ in range(copies)]
        packed = [_packed(weight, config) for weight in dense]
        for m in tokens:
            x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            few = quantize_few(x, config)
            times = {
                "bf16 us": _graphed([partial(F.linear, x, w) for w in dense]),
                "decode us": _graphed([partial(_few, x, w, config) for w in packed]),
                "product us": _graphed([partial(_product, few, m, w, config) for w in packed]),
                "gemm us": _graphed([partial(_many, x, w, config) for w in packed]),
            }
            rows.append(
                {"shape": f"{n}x{k}", "tokens": m, **times, "speed-up": times["bf16 us"] / times["decode us"]}
                | {"TB/s": packed[0].nbytes / times["product us"] / 1e6}
            )
    return rows


def _packed(weight: Tensor, config: QuartetConfig) -> MXFP4Tensor:
    packed = quantize_mxfp4(weight, config=config)
    assert isinstance(packed, MXFP4Tensor)
    return packed


def _product(few: tuple[Tensor, Tensor], tokens: int, weight: MXFP4Tensor, config: QuartetConfig) -> Tensor:
    from .triton.decode import multiply_few

    alpha = forward_factor(config) ** 2
    return multiply_few(*few, weight.codes, weight.scales, tokens, alpha=alpha, bias=None, out_dtype=torch.bfloat16)


def _few(x: Tensor, weight: MXFP4Tensor, config: QuartetConfig) -> Tensor:
    return ops.decode_linear(x, weight.codes, weight.scales, None, torch.bfloat16, config.text)


def _many(x: Tensor, weight: MXFP4Tensor, config: QuartetConfig) -> Tensor:
    _, _, a = _project(x, config, False)
    packed = weight.codes, weight.scales
    b = ops.operand(*packed, *ops.expand(*packed, torch.float32, config.text))
    return ops.matmul(*a, *b, None, torch.bfloat16, config.text)


def _graphed(calls: list[Callable[[], Tensor]], rounds: int = 8, repeats: int = 30) -> float:
    """Median microseconds a call, all calls in turn replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    return statistics.median(times[5:])
