"""A small run of every kernel that this GPU can run, or of those of the backends named, for NVIDIA's sanitizer:

compute-sanitizer --tool memcheck python tests/gpu/every_kernel.py fp8
compute-sanitizer --tool racecheck python tests/gpu/every_kernel.py fp8
"""

import sys

import torch

from quartet_kernels import QuartetConfig, available_backends, quantize_mxfp4, quartet_linear


def main() -> None:
    torch.manual_seed(0)
    reasons = available_backends("cuda")
    found = [name for name, reason in reasons.items() if reason.startswith("can run") and name != "reference"]
    changes = [
        {"scale_rule": "nearest", "backward_rounding": "stochastic", "accumulation": "precise"},
        {"forward_method": "abs_max", "hadamard_group_size": 128, "transform_init": "gsr"},
        {},
    ]
    for name in sys.argv[1:] or found:
        for change in changes:
            config = QuartetConfig(backend=name, **change)
            # Ragged: 77 tokens, a width that is no power of two, and rows longer than what one program holds.
            for inputs, outputs in ((384, 160), (8448, 96)):
                x = torch.randn(77, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                bias = torch.randn(outputs, device="cuda", dtype=torch.bfloat16)
                quartet_linear(x, weight, bias, config=config, seed=1).sum().backward()
                with torch.no_grad():
                    packed = quantize_mxfp4(weight, config=config)
                    for tokens in (1, 8, 16, 77):
                        quartet_linear(x[:tokens], packed, bias, config=config)
    # Operands that are not aligned to 16 bytes take another kernel.
    flat = torch.randn(77 * 384 + 1, device="cuda", dtype=torch.bfloat16)
    quartet_linear(
        flat[1:].view(77, 384), torch.randn(72 * 4, 384, device="cuda", dtype=torch.bfloat16), config=QuartetConfig()
    )
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
