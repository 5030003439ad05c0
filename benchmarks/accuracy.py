"""Errors of the FP8 backend's products against the float64 product of the same MXFP4 operands.

    python benchmarks/accuracy.py

A line for each kind of data, K, product and accumulation: the relative error |y - y_ref| / |y_ref| (Frobenius, float32
output) and the bias <y - y_ref, y_ref> / <y_ref, y_ref>. All products sum over K: in features for y, out features for
dX, tokens for dW.
"""

import torch
from torch import Tensor

from quartet_kernels import QuartetConfig
from quartet_kernels.backends import load_backend
from quartet_kernels.philox import SIGNS_DW, make_seed

ROWS = 1024


def gaussian(k: int) -> Tensor:
    return torch.randn(ROWS, k, device="cuda", dtype=torch.bfloat16)


def outliers(k: int) -> Tensor:
    x = torch.randn(ROWS, k, device="cuda")
    return torch.where(torch.rand_like(x) < 1e-3, 50 * x, x).to(torch.bfloat16)


def activations(k: int) -> Tensor:
    """SiLU, which is not symmetric."""
    return torch.nn.functional.silu(torch.randn(ROWS, k, device="cuda")).to(torch.bfloat16)


def decoded(operand: tuple[Tensor, Tensor]) -> Tensor:
    data, scale = operand
    return data.to(torch.float64) * scale.to(torch.float64)[:, None]


def main() -> None:
    torch.manual_seed(0)
    backend = load_backend("fp8")
    config = QuartetConfig()
    seed = torch.tensor(make_seed(0), device="cuda")
    options = {"signs": None, "sign_role": SIGNS_DW, "seed": seed, "role": 0, "rounding": "nearest"}
    print("| data | K | product | fast: error | fast: bias | precise: error | precise: bias |")
    print("|---|---|---|---|---|---|---|")
    for data in (gaussian, outliers, activations):
        for k in (4096, 14336, 16384):
            x, w = data(k), 0.02 * gaussian(k) + (0.3 * data(k) if data is activations else 0)
            packed = backend.quantize_forward(w.t().contiguous(), config=config, mask=False)
            products = {
                "y": (
                    backend.quantize_forward(x, config=config, mask=False)[3:],
                    backend.quantize_forward(w, config=config, mask=False)[3:],
                ),
                "dX": (
                    backend.quantize_backward(x, transpose=False, **options),
                    backend.requantize(*packed[:2], **options),
                ),
                "dW": (
                    backend.quantize_backward(x.t().contiguous(), transpose=True, **options),
                    backend.requantize(*packed[:2], **options),
                ),
            }
            for name, (a, b) in products.items():
                reference = decoded(a) @ decoded(b).T
                cells = []
                for accumulation in ("fast", "precise"):
                    y = backend.matmul(
                        *a, *b, alpha=1.0, bias=None, mask=None, matrix=None, out_dtype=torch.float32,
                        accumulation=accumulation,
                    ).to(torch.float64)  # fmt: skip
                    error = ((y - reference).norm() / reference.norm()).item()
                    bias = ((y - reference).mul(reference).sum() / reference.square().sum()).item()
                    cells += [f"{error:.1e}", f"{bias:+.1e}"]
                print(f"| {data.__name__} | {k} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
