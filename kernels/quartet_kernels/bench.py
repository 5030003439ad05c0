"""Measure on the user's own machine: each kernel against its ceiling, and one linear against what else there is.

Medians of ``triton.testing.do_bench`` (which empties the L2 cache before every run), random data, one process: only
ratios within one run mean anything.
"""

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import bench_decode
from .backends import _missing, select_backend
from .config import QuartetConfig
from .linear import quartet_linear
from .philox import GRAD, GRAD_T, INPUT_T, SIGNS_DW, SIGNS_DX, make_seed
from .rotation import rotation_matrix

Shape = tuple[int, int, int]
GPU_SHAPES: tuple[Shape, ...] = ((16384, 4096, 14336), (16384, 4096, 4096), (8192, 8192, 8192))
CPU_SHAPES: tuple[Shape, ...] = ((2048, 1024, 1024),)
Row = dict[str, Any]


def parse_shape(text: str) -> Shape:
    """``"16384x4096x14336"``: tokens x in_features x out_features.

    Raises:
        ValueError: If it is not three positive integers, or a linear of these sizes has no MXFP4.
    """
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{text!r} is no shape; write tokens x in_features x out_features, like 16384x4096x14336.")
    if int(parts[1]) % 32 or int(parts[2]) % 32:
        raise ValueError(f"{text!r}: in_features and out_features must be multiples of 32.")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _milliseconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(function, warmup=50, rep=200, return_mode="median")
    function()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """TB/s of a device-to-device copy, bytes read plus bytes written."""
    source = torch.randn((1 << 30 if device.type == "cuda" else 1 << 27) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _milliseconds(lambda: target.copy_(source), device) / 1e9


def matmul_ceilings(shape: Shape, device: torch.device) -> dict[str, float]:
    """TFLOP/s of the vendor's library for tokens x in x out: bfloat16, and FP8 with row-wise scales."""
    m, k, n = shape
    flop = 2e-9 * m * n * k
    a, b = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (m, n))
    row = {"bf16": flop / _milliseconds(lambda: a @ b.t(), device)}
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 9):
        return row
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    scale_a, scale_b = torch.ones(m, 1, device=device), torch.ones(1, n, device=device)
    for name, fast in (("fp8_fast", True), ("fp8_precise", False)):
        scaled_mm = functools.partial(torch._scaled_mm, out_dtype=torch.bfloat16, use_fast_accum=fast)
        row[name] = flop / _milliseconds(functools.partial(scaled_mm, a8, b8.t(), scale_a, scale_b), device)
    return row


def kernels(shape: Shape, device: torch.device, bandwidth: float) -> list[Row]:
    """Each kernel of the automatic backend on one linear's tensors: ms, TB/s or TFLOP/s, share of its ceiling."""
    tokens, inputs, outputs = shape
    backend = select_backend("auto", device, torch.bfloat16)
    config = QuartetConfig()
    x = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16)
    weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
    dy = torch.randn(tokens, outputs, device=device, dtype=torch.bfloat16)
    seed = torch.tensor(make_seed(0), device=device)
    matrix = rotation_matrix(config.transform_init, config.hadamard_group_size, device)
    rows: list[Row] = []

    def record(name: str, function: Callable[[], Any], moved: int = 0, flop: float = 0, ceiling: float = 0) -> None:
        ms = _milliseconds(function, device)
        row: Row = {"kernel": name, "shape": "x".join(map(str, shape)), "ms": ms}
        if moved:
            row |= {"TB/s": moved / ms / 1e9, "of copy": moved / ms / 1e9 / bandwidth}
        if flop:
            row |= {"TFLOP/s": flop / ms / 1e9, "of library": flop / ms / 1e9 / ceiling}
        rows.append(row)

    def size(*tensors: Any) -> int:
        return sum(t.nbytes for t in tensors if isinstance(t, Tensor))

    common: dict[str, Any] = {"signs": None, "seed": seed}
    for rounding in ("nearest", "stochastic"):
        options = common | {"rounding": rounding}

        def by_row(options: dict[str, Any] = options) -> Any:
            return backend.quantize_backward(dy, sign_role=SIGNS_DX, role=GRAD, transpose=False, **options)

        def by_column(options: dict[str, Any] = options) -> Any:
            return backend.quantize_backward(dy, sign_role=SIGNS_DW, role=GRAD_T, transpose=True, **options)

        record(f"gradient by row, {rounding}", by_row, size(dy, *by_row()))
        record(f"gradient by column, {rounding}", by_column, size(dy, *by_column()))

    def forward(x: Tensor) -> Any:
        return backend.quantize_forward(x, config=config, mask=True)

    master = weight.to(torch.float32)
    codes, scales, mask, *operand = forward(x)
    record("forward", lambda: forward(x), size(x, codes, scales, mask, *operand))
    record("forward of a float32 weight", lambda: forward(master), size(master, *forward(master)))

    def transposed() -> Any:
        return backend.requantize(codes, scales, sign_role=SIGNS_DW, role=INPUT_T, rounding="nearest", **common)

    b_t = transposed()
    record("packed to transposed", transposed, size(codes, scales, *b_t))

    a = backend.expand(codes, scales) if backend.packed else operand
    w_codes, w_scales, w_mask, *w_operand = backend.quantize_forward(weight, config=config, mask=True)
    w = backend.expand(w_codes, w_scales) if backend.packed else w_operand
    g_t = backend.quantize_backward(
        dy, sign_role=SIGNS_DW, role=GRAD_T, transpose=True, **(common | {"rounding": "nearest"})
    )
    library: dict[str, float] = matmul_ceilings(shape, device)
    plain: dict[str, Any] = {"alpha": 1.0, "bias": None, "out_dtype": torch.bfloat16, "mask": None, "matrix": None}
    for accumulation in ("fast", "precise") if backend.name == "fp8" else ("auto",):
        ceiling = library[f"fp8_{accumulation}" if backend.name == "fp8" else "bf16"]
        for name, left, right, epilogue in (
            ("forward", a, w, {}),
            ("dW with mask and inverse rotation", g_t, b_t, {"mask": w_mask, "matrix": matrix}),
        ):
            product = functools.partial(backend.matmul, *left, *right, **(plain | epilogue), accumulation=accumulation)
            record(f"matmul {name}, {accumulation}", product, flop=2.0 * tokens * inputs * outputs, ceiling=ceiling)
    return rows


def _time_layer(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, parameters: list[Tensor]) -> Row:
    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def both() -> None:
        for tensor in (x, *parameters):
            tensor.grad = None
        layer(x).backward(dy)

    forward_ms, both_ms = _milliseconds(forward, x.device), _milliseconds(both, x.device)
    return {"forward ms": forward_ms, "backward ms": both_ms - forward_ms, "both ms": both_ms}


def linears(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Forward, backward and both of one linear: plain (the better of eager and compiled), ours, and peers."""
    tokens, inputs, outputs = shape
    x = torch.randn(tokens, inputs, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, outputs, device=device, dtype=dtype)
    linear = nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)
    seed = torch.tensor(make_seed(0), device=device)

    def ours(**options: Any) -> Callable[[Tensor], Tensor]:
        config = QuartetConfig(**options)
        return lambda tensor: quartet_linear(tensor, linear.weight, config=config, seed=seed)

    plain = [_time_layer(linear, x, dy, [linear.weight])]
    candidates: dict[str, Callable[[Tensor], Tensor]] = {}
    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        torch._dynamo.reset()  # the last shape's graphs would make this one's dynamic
        plain.append(_time_layer(torch.compile(linear), x, dy, [linear.weight]))
        for accumulation in ("fast", "precise") if select_backend("auto", device, dtype).name == "fp8" else ("auto",):
            candidates[f"quartet, {accumulation}"] = ours(accumulation=accumulation)
        candidates["quartet, compiled"] = torch.compile(ours())
        candidates["quartet_stochastic"] = ours(backward_rounding="stochastic")
        candidates["mxfp8_backward"] = ours(backward_dtype="mxfp8")
        candidates["bf16_backward"] = ours(backward_dtype="bf16")
        if _missing("bf16", device) is None:
            pseudo = ours(backward_dtype="bf16", backend="bf16")
            candidates["pseudo-quantised (bf16 operands, bf16 backward)"] = pseudo
        candidates |= _torchao(linear)
    else:
        candidates["quartet"] = ours()
        candidates["quartet_stochastic"] = ours(backward_rounding="stochastic")
        candidates["mxfp8_backward"] = ours(backward_dtype="mxfp8")
        candidates["bf16_backward"] = ours(backward_dtype="bf16")
    best = min(plain, key=lambda row: row["both ms"])
    rows = [{"linear": f"nn.Linear, {name}", "shape": "x".join(map(str, shape)), **best, "ratio": 1.0}]
    for label, layer in candidates.items():
        row = _time_layer(layer, x, dy, [linear.weight])
        rows.append({"linear": label, "shape": rows[0]["shape"], **row, "ratio": row["both ms"] / best["both ms"]})
    return rows


def _torchao(linear: nn.Linear) -> dict[str, Callable[[Tensor], Tensor]]:
    """torchao's float8 training, compiled, where the package is installed; it shares the weight."""
    if importlib.util.find_spec("torchao") is None:
        return {}
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    layers: dict[str, Callable[[Tensor], Tensor]] = {}
    for recipe in ("tensorwise", "rowwise"):
        model = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta"))
        model[0].weight = linear.weight
        convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(recipe))
        layers[f"torchao float8 {recipe}, compiled"] = torch.compile(model)
    return layers


def run(shapes: list[Shape] | None = None) -> dict[str, Any]:
    """All measurements as plain numbers: ``device``, ``versions``, ``copy TB/s``, ``kernels``, ``linears``, and on
    NVIDIA's GPUs ``decode``: `quartet_kernels.bench_decode.decode` of the same layers or of its own."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    layers = tuple((n, k) for _, k, n in shapes) if shapes else bench_decode.SHAPES
    shapes = shapes or list(GPU_SHAPES if cuda else CPU_SHAPES)
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(device)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "versions": versions(),
        "copy TB/s": bandwidth,
        "backend": select_backend("auto", device, torch.bfloat16).name,
        "kernels": [],
        "linears": [],
        "decode": [],
    }
    for shape in shapes:
        if cuda:
            report["kernels"] += kernels(shape, device, bandwidth)
            report["linears"] += linears(shape, device, torch.bfloat16)
        else:
            report["linears"] += linears(shape, device, torch.float32)
    if cuda and torch.version.hip is None and report["backend"] != "reference":
        report["decode"] = bench_decode.decode(layers)
    return report


def versions() -> dict[str, str]:
    """Versions of the packages that decide speed and numbers."""
    found = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in ("triton", "torchao"):
        if importlib.util.find_spec(name):
            found[name] = importlib.import_module(name).__version__
    return found


def tables(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        f"{report['device']}, backend {report['backend']}, "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        f"copy: {report['copy TB/s']:.2f} TB/s (bytes read and written)",
    ]
    for rows in (report["kernels"], report["linears"], report["decode"]):
        if not rows:
            continue
        columns = list(dict.fromkeys(name for row in rows for name in row))
        cells = [columns] + [[_cell(row.get(name)) for name in columns] for row in rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        lines.append("")
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
