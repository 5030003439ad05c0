"""Compile GEMMs and quantisers for GPUs that are not here; print what the compilers made of them, a JSON object a line.

    python tests/kernels/crosscompile.py [--arch 90 --arch 100 ...]
    python tests/kernels/crosscompile.py --amd

Needs neither a GPU nor a driver: Triton brings its assemblers. Must not run under TRITON_INTERPRET=1, which turns every
kernel into a Python function.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_source

AMD = "--amd" in sys.argv
if AMD:  # kernels ask when they are made
    torch.version.hip = "cross-compiling"

from quartet_kernels.triton import fp8_matmul, matmul, native_matmul, quantize, requantize  # noqa: E402

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
PACKED_ARCHITECTURES = ("80", "86", "89", "90", "100", "103", "120", "gfx942", "gfx950")
NATIVE_ARCHITECTURES = ("100", "103", "120", *(("121",) if TRITON >= (3, 9) else ()), "gfx950")
TYPES = {
    "a_ptr": "*u8", "b_ptr": "*u8", "a_scales_ptr": "*u8", "b_scales_ptr": "*u8", "a_scale_ptr": "*fp32",
    "b_scale_ptr": "*fp32", "bias_ptr": "*bf16", "mask_ptr": "*i32", "rotation_ptr": "*fp32", "alpha": "fp32",
    "rotation_scale": "fp32", "M": "i32", "N": "i32", "K": "i32",
}  # fmt: skip
FORWARD = {"BIAS": True, "MASK": False, "G": 0, "PIECES": 2}
BACKWARD = {"BIAS": False, "MASK": True, "G": 32, "PIECES": 2}
BACKWARD_FLOAT32 = BACKWARD | {"PIECES": 3}
EPILOGUES = {"forward": FORWARD, "backward": BACKWARD, "backward_float32": BACKWARD_FLOAT32}
MATRIX_INSTRUCTION = re.compile(
    r"^\s*(?:@!?%?\w+\s+)?((?:tcgen05\.mma|wgmma\.mma_async|mma\.sync)[\w.:]*)", re.MULTILINE
)
AMD_INSTRUCTION = re.compile(r"^\s*(v_mfma\w+)", re.MULTILINE)


def cases() -> Iterator[tuple[str, str, str, Any, dict[str, Any], dict[str, str], int, int]]:
    """(architecture, kernel, epilogue, function, constexprs, more types, warps, stages) of default configurations."""
    for name, epilogue in EPILOGUES.items():
        out = "fp32" if epilogue["PIECES"] == 3 else "bf16"
        # Of the portable kernel the two ends only: between them lies nothing new.
        for arch in PACKED_ARCHITECTURES if name != "backward" else ():
            major = 9 if arch.startswith("gfx") else int(arch) // 10
            tile = matmul.PACKED_TILES.get(major, matmul.SMALL_PACKED_TILE)
            blocks = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile, strict=True), GROUP_M=8)
            yield arch, "packed", name, matmul.packed_matmul_kernel, epilogue | blocks, {"c_ptr": "*" + out}, 8, 3
        for arch in NATIVE_ARCHITECTURES:
            blocks = {
                "BLOCK_M": native_matmul.BLOCK_M,
                "BLOCK_N": native_matmul.BLOCK_N,
                "BLOCK_K": native_matmul.BLOCK_K,
            }
            constants = epilogue | blocks | {"GROUP_M": 8}
            types = {"c_ptr": "*" + out}
            yield arch, "native", name, native_matmul.native_matmul_kernel, constants, types, native_matmul.WARPS, 3
        for precise in (False, True):
            out_bytes = 4 if out == "fp32" else 2
            tile = fp8_matmul.tma_tile(16384, 4096, 132, precise, epilogue["MASK"], epilogue["G"], out_bytes)
            constants = epilogue | {
                "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": 8,
                "PARTS": tile.parts, "WARPS": 0 if precise else tile.warps, "PRECISE": precise,
            }  # fmt: skip
            types = {
                "a_desc": f"tensordesc<fp8e5[{tile.block_m}, {tile.block_k}]>",
                "b_desc": f"tensordesc<fp8e5[{tile.block_n}, {tile.block_k}]>",
                "c_desc": f"tensordesc<{out}[{tile.block_m}, {tile.block_n // tile.parts}]>",
            }
            kernel = "fp8_precise" if precise else "fp8_fast"
            yield "90", kernel, name, fp8_matmul.fp8_tma_kernel, constants, types, tile.warps, tile.stages
        constants = epilogue | {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP_M": 8, "PRECISE": False}
        types = {"a_ptr": "*fp8e5", "b_ptr": "*fp8e5", "c_ptr": "*" + out}
        for arch in ("89", "90"):
            yield arch, "fp8_pointer", name, fp8_matmul.fp8_pointer_kernel, constants, types, 8, 2


QUANTISER_ARCHITECTURES = ("80", "90", "100", "120", "gfx942", "gfx950")
QUANTISER_TYPES = {
    "x_ptr": "*bf16", "matrix_ptr": "*bf16", "seed_ptr": "*i64", "codes_ptr": "*i32", "scales_ptr": "*u8",
    "mask_ptr": "*u8", "in_codes_ptr": "*u8", "in_scales_ptr": "*u8", "n_rows": "i32", "n_groups": "i32",
    "n_tokens": "i32", "n_features": "i32", "factor": "fp32", "row_stride": "i32",
}  # fmt: skip
RUN_TIME = ("M", "n_rows", "n_groups", "n_tokens")
"""Numbers of tokens: launches promise nothing about them."""


def quantiser_cases() -> Iterator[tuple[str, str, str, Any, dict[str, Any], dict[str, str], int, int]]:
    """The same of the quantisers that write packed codes: forward, gradient by column, packed to transposed."""
    forward = {
        "signs_ptr": None, "seed_ptr": None, "data_ptr": None, "row_scale_ptr": None, "row_stride": 0,
        "CONTIGUOUS": True, "G": 32, "METHOD": "rms", "RULE": "mse", "STOCHASTIC": False, "ROLE": 0, "SIGN_ROLE": None,
        "R": quantize.GROUPS_PER_TILE, "PER_ROW": 1, "STAGES": quantize.STAGES,
    }  # fmt: skip
    tile = {
        "signs_ptr": None, "data_ptr": None, "STOCHASTIC": False, "ROLE": 0, "SIGN_ROLE": 1,
        "TOKENS": quantize.TOKENS_PER_TILE, "FEATURES": quantize.FEATURES_PER_TILE,
        "STAGES": quantize.TRANSPOSED_STAGES,
    }  # fmt: skip
    for arch in QUANTISER_ARCHITECTURES:
        for name, function, constants in (
            ("quantize_rows", quantize.quantize_rows_kernel, forward),
            ("quantize_columns", quantize.quantize_columns_kernel, tile),
            ("requantize", requantize.requantize_kernel, tile),
        ):
            yield arch, name, "packed", function, constants, QUANTISER_TYPES, quantize.NUM_WARPS, 1


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack (spills) of a cubin, read by the cuobjdump in Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {text}")
    return int(found[1]), int(found[2])


def compile_case(arch: str, function: Any, constants: dict, types: dict[str, str], warps: int, stages: int) -> dict:
    """Compile one kernel with the specialisations a launch would have; instructions and resources."""
    types = TYPES | types
    signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
    divisible = [
        (index,)
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name not in RUN_TIME)
    ]
    source = ASTSource(
        function, signature, constexprs=constants, attrs={i: [["tt.divisibility", 16]] for i in divisible}
    )
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch), 32)
    kernel = compile_source(source, target=target, options={"num_warps": warps, "num_stages": stages})
    if amd:
        text = kernel.asm["amdgcn"]
        number = {key: int(re.search(rf"{key}:\s*(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
        found, registers, stack = AMD_INSTRUCTION.findall(text), number["vgpr_count"], 4 * number["vgpr_spill_count"]
    else:
        found = MATRIX_INSTRUCTION.findall(kernel.asm["ptx"])
        registers, stack = registers_and_stack(kernel.asm["cubin"])
    return {
        "instructions": dict(Counter(found)),
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "tensor_memory": getattr(kernel.metadata, "tmem_size", 0) or 0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", help="compute capability without the dot; all by default")
    parser.add_argument("--amd", action="store_true", help="AMD's architectures instead of NVIDIA's")
    chosen = parser.parse_args().arch
    for arch, kernel, epilogue, function, constants, types, warps, stages in (*cases(), *quantiser_cases()):
        if arch.startswith("gfx") == AMD and (chosen is None or arch in chosen):
            row = compile_case(arch, function, constants, types, warps, stages)
            print(json.dumps({"arch": arch, "kernel": kernel, "epilogue": epilogue} | row), flush=True)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
