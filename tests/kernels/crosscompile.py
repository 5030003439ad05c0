"""Compile every kernel for GPUs that are not here; print what the compilers made of each, a JSON object a line.

    python tests/kernels/crosscompile.py [--arch 90 --arch 100 ...] [--part 1/2]
    python tests/kernels/crosscompile.py --amd

Needs neither a GPU nor a driver: Triton brings its assemblers. Must not run under TRITON_INTERPRET=1, which turns every
kernel into a Python function. `resources.py` makes a table of it.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_source

AMD = "--amd" in sys.argv
if AMD:  # kernels ask when they are made
    torch.version.hip = "cross-compiling"

from quartet_kernels.triton import (  # noqa: E402
    decode,
    expand,
    fp8_matmul,
    matmul,
    mxfp8,
    native_matmul,
    quantize,
    requantize,
)

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
LATEST = ("121",) if TRITON >= (3, 9) else ()
ARCHITECTURES = ("80", "86", "89", "90", "100", "103", "120", *LATEST, "gfx942", "gfx950")
FP8 = ("89", "90")
TILED = ("100", "103")
NATIVE = (*TILED, "120", *LATEST, "gfx950")
TYPES = {
    "a_ptr": "*u8", "b_ptr": "*u8", "a_scales_ptr": "*u8", "b_scales_ptr": "*u8", "a_scale_ptr": "*fp32",
    "b_scale_ptr": "*fp32", "bias_ptr": "*bf16", "mask_ptr": "*i32", "rotation_ptr": "*fp32", "alpha": "fp32",
    "rotation_scale": "fp32", "M": "i32", "N": "i32", "K": "i32",
}  # fmt: skip
FORWARD = {"BIAS": True, "MASK": False, "G": 0, "PIECES": 2}
BACKWARD = {"BIAS": False, "MASK": True, "G": 32, "PIECES": 2}
BACKWARD_FLOAT32 = BACKWARD | {"PIECES": 3}
EPILOGUES = {"forward": FORWARD, "backward": BACKWARD, "backward_float32": BACKWARD_FLOAT32}
GROUPS = (64, 128)
"""Wider rotations, looked at on Hopper."""
MATRIX_INSTRUCTION = re.compile(
    r"^\s*(?:@!?%?\w+\s+)?((?:tcgen05\.(?:mma|cp)|wgmma\.mma_async|mma\.sync)[\w.:]*)", re.MULTILINE
)
AMD_INSTRUCTION = re.compile(r"^\s*(v_mfma\w+)", re.MULTILINE)
RUN_TIME = ("M", "n_rows", "n_groups", "n_tokens")
"""Numbers of tokens: launches promise nothing about them."""


class Case(NamedTuple):
    """One kernel in its default configuration: constexpr arguments (None for pointers that are left out), types of the
    others where they are not those of TYPES, warps, stages and registers a thread (as many as it likes if None)."""

    arch: str
    kernel: str
    epilogue: str
    function: Any
    constants: dict[str, Any]
    types: dict[str, str]
    warps: int
    stages: int = 3
    registers: int | None = None


def products() -> Iterator[Case]:
    """The GEMMs."""
    for name, epilogue in EPILOGUES.items():
        out = "fp32" if epilogue["PIECES"] == 3 else "bf16"
        # Of the portable kernel the two ends only: between them lies nothing new.
        for arch in ARCHITECTURES if name != "backward" else ():
            major = 9 if arch.startswith("gfx") else int(arch) // 10
            tile = matmul.PACKED_TILES.get(major, matmul.SMALL_PACKED_TILE)
            blocks = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile, strict=True), GROUP_M=8)
            yield Case(arch, "packed", name, matmul.packed_matmul_kernel, epilogue | blocks, {"c_ptr": "*" + out}, 8)
        block_m, block_n, warps = native_matmul.BLOCK_M, native_matmul.BLOCK_N, native_matmul.WARPS
        for arch in NATIVE:
            for operands, form in (("mxfp4", "e2m1"), ("mxfp8", "e4m3")) if epilogue["MASK"] else (("mxfp4", "e2m1"),):
                element, per_byte = ("u8", 2) if form == "e2m1" else ("fp8e4nv", 1)
                block_k = native_matmul.BLOCK_K * (per_byte if arch in TILED else 1)
                constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8, "FORMAT": form}
                types = {"c_ptr": "*" + out, "a_ptr": "*" + element, "b_ptr": "*" + element}
                for side, block in (("a", block_m), ("b", block_n)):
                    types[f"{side}_desc"] = f"tensordesc<{element}[{block}, {block_k // per_byte}]>"
                    types[f"{side}_scales_desc"] = f"tensordesc<u8[1, {block // 128}, {block_k // 128}, 2, 256]>"
                function = native_matmul.native_tma_kernel if arch in TILED else native_matmul.native_matmul_kernel
                yield Case(arch, f"native_{operands}", name, function, epilogue | constants, types, warps)
        for precise in (False, True):
            yield fp8(name, epilogue, 16384, precise)
        constants = epilogue | {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP_M": 8, "PRECISE": False}
        types = {"a_ptr": "*fp8e5", "b_ptr": "*fp8e5", "c_ptr": "*" + out}
        for arch in FP8:
            yield Case(arch, "fp8_pointer", name, fp8_matmul.fp8_pointer_kernel, constants, types, 8, 2)
    for name, group, precise in itertools.product(("backward", "backward_float32"), GROUPS, (False, True)):
        yield fp8(f"{name}_group_{group}", EPILOGUES[name] | {"G": group}, 16384, precise)
    for name, (group, precise) in itertools.product(("backward", "backward_float32"), ((32, True), (64, False))):
        # Fewer tiles than the GPU has multiprocessors.
        yield fp8(f"{name}_group_{group}_few", EPILOGUES[name] | {"G": group}, 256, precise)


def fp8(name: str, epilogue: dict[str, Any], M: int, precise: bool) -> Case:
    """Hopper's GEMM of FP8 operands for an output [M, 4096]."""
    out, out_bytes = ("fp32", 4) if epilogue["PIECES"] == 3 else ("bf16", 2)
    tile = fp8_matmul.tma_tile(M, 4096, 132, precise, epilogue["MASK"], epilogue["G"], out_bytes)
    constants = epilogue | {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": 8,
        "PARTS": tile.parts, "WARPS": tile.rotating_warps, "PRECISE": precise,
    }  # fmt: skip
    types = {
        "a_desc": f"tensordesc<fp8e5[{tile.block_m}, {tile.block_k}]>",
        "b_desc": f"tensordesc<fp8e5[{tile.block_n}, {tile.block_k}]>",
        "c_desc": f"tensordesc<{out}[{tile.block_m}, {tile.block_n // tile.parts}]>",
    }
    kernel = "fp8_precise" if precise else "fp8_fast"
    return Case("90", kernel, name, fp8_matmul.fp8_tma_kernel, constants, types, tile.warps, tile.stages)


QUANTISER_TYPES = {
    "x_ptr": "*bf16", "matrix_ptr": "*bf16", "seed_ptr": "*i64", "codes_ptr": "*i32", "scales_ptr": "*u8",
    "tiled_ptr": "*u8", "mask_ptr": "*u8", "data_ptr": "*bf16", "row_scale_ptr": "*fp32", "in_codes_ptr": "*u8",
    "in_scales_ptr": "*u8", "n_rows": "i32", "n_groups": "i32", "n_tokens": "i32", "n_features": "i32",
    "extent_ptr": "*i32", "n_columns": "i32", "factor": "fp32", "row_stride": "i32",
}  # fmt: skip


def quantisers(arch: str) -> Iterator[Case]:
    """The quantisers, with the operand format of an architecture's backend."""
    warps, form = quantize.NUM_WARPS, "packed"
    unused: dict[str, Any] = {"signs_ptr": None, "data_ptr": None, "tiled_ptr": None}
    if arch in TILED:
        form, written = "tiled", {"signs_ptr": None, "data_ptr": None, "scales_ptr": None}
    elif arch in ("80", "86"):
        form, written = "bf16", {"signs_ptr": None, "codes_ptr": None, "scales_ptr": None, "tiled_ptr": None}
    else:
        written = unused
    rows = {
        "CONTIGUOUS": True, "G": 32, "STOCHASTIC": False, "ROLE": 0, "R": quantize.GROUPS_PER_TILE, "PER_ROW": 1,
        "STAGES": quantize.STAGES, "row_scale_ptr": None, "row_stride": 0,
    }  # fmt: skip
    kept = {name: value for name, value in written.items() if name not in ("codes_ptr", "scales_ptr")}
    forward = rows | kept | {"seed_ptr": None, "METHOD": "rms", "RULE": "mse", "SIGN_ROLE": None}
    gradient = rows | written | {"mask_ptr": None, "METHOD": "abs_max", "RULE": None, "SIGN_ROLE": 0}
    types = QUANTISER_TYPES
    if arch in FP8:  # whole rows, as FP8 at once; of the gradient that alone
        form, types = "fp8", QUANTISER_TYPES | {"data_ptr": "*i32"}
        rows_at_once = {"PER_ROW": 128, "row_stride": "run-time", "row_scale_ptr": "run-time", "data_ptr": "run-time"}
        forward |= rows_at_once
        gradient |= rows_at_once | {"codes_ptr": None, "scales_ptr": None}
        forward, gradient = (
            {name: value for name, value in constants.items() if value != "run-time"}
            for constants in (forward, gradient)
        )
    tile = written | {
        "STOCHASTIC": False, "ROLE": 0, "SIGN_ROLE": 1, "FEATURES": quantize.FEATURES_PER_TILE,
        "STAGES": quantize.TRANSPOSED_STAGES,
    }  # fmt: skip
    yield Case(arch, "quantize_forward", form, quantize.quantize_rows_kernel, forward, types, warps)
    kinds = [(32, "fp32"), *itertools.product(GROUPS, ("bf16", "fp32"))] if arch == "90" else []
    for (group, dtype), per_row in itertools.product(kinds, (1, 64, 128)):
        wide = forward | {"G": group, "R": max(2 * group, 128), "PER_ROW": per_row, "CONTIGUOUS": per_row != 64}
        if per_row == 1:  # codes alone
            wide |= {"row_scale_ptr": None, "data_ptr": None}
        wide["STAGES"] = quantize.row_stages(group, 4 if dtype == "fp32" else 2)
        wide_types = types | {"x_ptr": "*" + dtype, "matrix_ptr": "*" + dtype}
        name = f"{dtype}_group_{group}_rows_{per_row}"
        yield Case(arch, "quantize_forward", name, quantize.quantize_rows_kernel, wide, wide_types, max(4, group // 16))
    yield Case(arch, "quantize_rows", form, quantize.quantize_rows_kernel, gradient, types, warps)
    yield Case(arch, "quantize_columns", form, quantize.quantize_columns_kernel, tile, types, warps)
    requantized = tile | {"row_scale_ptr": None, "extent_ptr": None, "CHECK": False}
    yield Case(arch, "requantize", form, requantize.requantize_kernel, requantized, types, warps)
    if arch in FP8:  # FP8 at once, without codes
        at_once = {name: value for name, value in tile.items() if name != "data_ptr"}
        at_once |= {"codes_ptr": None, "scales_ptr": None}
        for stochastic, check in itertools.product((False, True), (False, True)):
            constants = at_once | {"CHECK": check, "STOCHASTIC": stochastic}
            name = "requantize fp8" + ", stochastic" * stochastic + ", checking" * check
            registers = requantize.FP8_REGISTERS if arch == "90" and not (stochastic or check) else None
            yield Case(arch, name, form, requantize.requantize_kernel, constants, types, warps, 3, registers)

    native = arch in NATIVE
    for name, packed, transpose in (("rows", False, False), ("columns", False, True), ("packed", True, True)):
        constants = {"TRANSPOSE": transpose, "TILED": arch in TILED, "ROWS": mxfp8.ROWS, "COLUMNS": mxfp8.COLUMNS}
        constants |= ({} if packed else {"in_scales_ptr": None}) | ({} if native else {"scales_ptr": None})
        types = QUANTISER_TYPES | ({"data_ptr": "*fp8e4nv"} if native else {}) | ({"x_ptr": "*u8"} if packed else {})
        form = "bf16" if not native else "tiled" if arch in TILED else "packed"
        yield Case(arch, f"mxfp8_{name}", form, mxfp8.mxfp8_kernel, constants, types, mxfp8.WARPS)


def others(arch: str) -> Iterator[Case]:
    """What is left: inverse rotation, dequantisation, expansion to FP8, the product of few tokens."""
    types = {"acc_ptr": "*fp32", "c_ptr": "*bf16", "codes_ptr": "*u8", "scales_ptr": "*u8", "out_ptr": "*bf16"}
    rotation = {"MASK": True, "G": 32, "PIECES": 2, "BLOCK_M": 64, "BLOCK_N": 128}
    yield Case(arch, "unrotate", "", matmul.unrotate_kernel, rotation, types, 4)
    for group in GROUPS if arch == "90" else ():
        yield Case(arch, "unrotate", f"group_{group}", matmul.unrotate_kernel, rotation | {"G": group}, types, 4)
    yield Case(arch, "dequantize", "", matmul.dequantize_kernel, {"BLOCK_M": 32, "BLOCK_K": 256}, types, 4)
    if not arch.startswith("gfx"):  # AMD's GPUs never take it
        types = {"x_ptr": "*u32", "x_scale_ptr": "*u64", "codes_ptr": "*u32", "scales_ptr": "*u8", "out_ptr": "*bf16"}
        for tokens in (1, 2, 4):
            hopper = int(arch) >= 90
            warps, tiles, blocks, ahead = decode.form(896, 132, tokens, hopper)
            few = {"K": 4096, "TOKENS": tokens, "WARPS": warps, "TILES": tiles, "BLOCKS": blocks, "AHEAD": ahead}
            few |= {"DEPENDENT": hopper}
            form = f"{8 * tokens} tokens"
            yield Case(arch, "decode", form, decode.decode_kernel, few | {"bias_ptr": None}, types, warps)
    if arch in FP8:
        constants = {"CHECK_CODES": False, "ROWS": 1, "PAIRS": expand.PAIRS}
        types = {"codes_ptr": "*i32", "scales_ptr": "*u8", "data_ptr": "*i32", "row_scale_ptr": "*fp32"}
        yield Case(arch, "expand", "", expand.expand_kernel, constants, types, expand.WARPS)


def cases() -> Iterator[Case]:
    """Every kernel for every GPU that may run it."""
    yield from products()
    for arch in ARCHITECTURES:
        yield from quantisers(arch)
        yield from others(arch)


class Device:
    """What kernels ask about the GPU that they are compiled for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target


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


def compile_case(case: Case) -> dict:
    """Compile one kernel with the specialisations a launch would have; instructions and resources."""
    types = TYPES | {"n_rows": "i32", "n_groups": "i32"} | case.types
    function = case.function
    signature = {name: "constexpr" if name in case.constants else types[name] for name in function.arg_names}
    divisible = [
        (index,)
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name not in RUN_TIME)
    ]
    source = ASTSource(
        function, signature, constexprs=case.constants, attrs={i: [["tt.divisibility", 16]] for i in divisible}
    )
    amd = case.arch.startswith("gfx")
    target = GPUTarget("hip", case.arch, 64) if amd else GPUTarget("cuda", int(case.arch), 32)
    triton.runtime.driver.set_active(Device(target))
    options = {"num_warps": case.warps, "num_stages": case.stages}
    options |= {} if case.registers is None else {"maxnreg": case.registers}
    kernel = compile_source(source, target=target, options=options)
    if amd:
        text = kernel.asm["amdgcn"]
        number = {key: int(re.search(rf"{key}:\s*(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
        found, registers, stack = AMD_INSTRUCTION.findall(text), number["vgpr_count"], 4 * number["vgpr_spill_count"]
    else:
        text = kernel.asm["ptx"]
        found = MATRIX_INSTRUCTION.findall(text)
        registers, stack = registers_and_stack(kernel.asm["cubin"])
    return {
        "arch": case.arch,
        "kernel": case.kernel,
        "epilogue": case.epilogue,
        "instructions": dict(Counter(found)),
        "conversions": text.count("cvt.rn.satfinite.e2m1x2.f32"),
        "warps": case.warps,
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "tensor_memory": getattr(kernel.metadata, "tmem_size", 0) or 0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", help="compute capability without the dot; all by default")
    parser.add_argument("--amd", action="store_true", help="AMD's architectures instead of NVIDIA's")
    parser.add_argument("--part", default="1/1", help="I/N: every N-th kernel from the I-th on")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    chosen = [case for case in cases() if case.arch.startswith("gfx") == AMD]
    chosen = [case for case in chosen if options.arch is None or case.arch in options.arch]
    for case in chosen[part - 1 :: parts]:
        print(json.dumps(compile_case(case)), flush=True)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
