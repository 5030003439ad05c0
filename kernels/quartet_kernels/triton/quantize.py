"""Fused quantisers: rotation, projection to MXFP4, codes, scales and clip mask in one launch.

    forward:  v = x H g^-1/2,      quantised as the configuration says, grouped along x's rows
    backward: v = (x D) H 32^-1/2, abs-max scale, along x's rows or, without a transposed copy, along its columns

Where the GEMM reads FP8, numbers are relative to the largest exponent of their row, which is only known when the whole
row is quantised: programs that hold whole rows write FP8 at once; for longer rows and for columns, a second launch
expands the codes (`requantize.py` guesses instead).
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import QuartetConfig
from ..rotation import BACKWARD_GROUP_SIZE, rotation_matrix
from .common import INTERPRET, empty_tiled, load_rotation, quantize_groups, rotate, stores_directly, tiles_scales
from .expand import expand
from .launch import cdiv, launch, multiprocessors, next_power_of_2

Operand = tuple[Tensor, Tensor]

GROUPS_PER_TILE = 2048 if INTERPRET.value else 128  # the interpreter's cost is per operation, not per element
WHOLE_ROW_GROUPS = {"forward": 256, "backward": 512}
"""Rows of 16-bit numbers up to this long are held by one program, of more warps where they do not fit a tile; of
float32, half as long: three rows of 32 KiB are in flight."""
FORWARD_PROGRAMS = 16  # a multiprocessor: two to three times what it holds at once, so that they end together
PROGRAMS = {"nearest": 14, "stochastic": 10}
STAGES = 3
SMALL = 2**24  # elements
TOKENS_PER_TILE = 128  # four groups
FEATURES_PER_TILE = 128 if INTERPRET.value else 64
TRANSPOSED_PROGRAMS = 8
TRANSPOSED_STAGES = 1  # copied ahead, long rows take longer
NUM_WARPS = 4


@triton.jit(do_not_specialize=["n_rows", "n_groups"])
def quantize_rows_kernel(
    x_ptr, matrix_ptr, signs_ptr, seed_ptr, codes_ptr, scales_ptr, mask_ptr, data_ptr, row_scale_ptr, n_rows, n_groups,
    factor, row_stride, tiled_ptr, CONTIGUOUS: tl.constexpr, G: tl.constexpr, METHOD: tl.constexpr, RULE: tl.constexpr,
    STOCHASTIC: tl.constexpr, ROLE: tl.constexpr, SIGN_ROLE: tl.constexpr, R: tl.constexpr, PER_ROW: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of R groups of x [n_rows, 32 n_groups], taken as one row-major sequence of groups (row_stride is only for x
    that is not CONTIGUOUS). With `row_scale_ptr`, a tile is R / PER_ROW whole rows: CONTIGUOUS ones of PER_ROW groups,
    or others, padded to that."""
    WIDTH: tl.constexpr = 32 if G == 0 else G
    block = tl.arange(0, R * 32 // WIDTH)
    column = tl.arange(0, WIDTH)
    local = tl.arange(0, R)
    matrix = load_rotation(matrix_ptr, signs_ptr, seed_ptr, SIGN_ROLE, G, x_ptr.dtype.element_ty)
    ROWS: tl.constexpr = R // PER_ROW
    if row_scale_ptr is not None and not CONTIGUOUS:
        for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
            first_row = tile * ROWS
            row = block * (WIDTH // 32) // PER_ROW
            index = block * (WIDTH // 32) % PER_ROW
            x_at = ((first_row + row).to(tl.int64) * row_stride + index * 32)[:, None] + column[None, :]
            x = tl.load(x_ptr + x_at, mask=((row < n_rows - first_row) & (index < n_groups))[:, None], other=0.0)
            v = rotate(x, matrix, factor)
            row = local // PER_ROW
            index = local % PER_ROW
            inside = (row < n_rows - first_row) & (index < n_groups)
            quantize_groups(
                v, tl.cast(first_row, tl.int64) * n_groups, row * n_groups + index, inside, seed_ptr, codes_ptr,
                scales_ptr, mask_ptr, data_ptr, METHOD, RULE, STOCHASTIC, ROLE, row_scale_ptr, first_row, n_rows, ROWS,
                DIRECT=stores_directly(),
            )  # fmt: skip
    else:
        total = n_rows * n_groups
        for tile in tl.range(tl.program_id(0), tl.cdiv(total, R), tl.num_programs(0), num_stages=STAGES):
            first = tl.cast(tile, tl.int64) * R
            left = total - tile * R  # groups from here to the end
            if CONTIGUOUS:
                x_at = first * 32 + (block[:, None] * WIDTH + column[None, :])
            else:
                index = tile * R + block * (WIDTH // 32)
                row = index // n_groups
                x_at = (row.to(tl.int64) * row_stride + (index - row * n_groups) * 32)[:, None] + column[None, :]
            if row_scale_ptr is not None and ROWS == 1:  # no tile is cut off
                x = tl.load(x_ptr + x_at)
            else:
                x = tl.load(x_ptr + x_at, mask=(block * (WIDTH // 32) < left)[:, None], other=0.0)
            v = rotate(x, matrix, factor)
            quantize_groups(
                v, first, local, local < left, seed_ptr, codes_ptr, scales_ptr, mask_ptr, data_ptr,
                METHOD, RULE, STOCHASTIC, ROLE, row_scale_ptr, tile * ROWS, n_rows, ROWS, tiled_ptr, n_groups,
                DIRECT=stores_directly(),
            )  # fmt: skip


@triton.jit
def quantize_transposed(
    v0, v1, v2, v3, first_token, first_feature, n_tokens, n_features, seed_ptr, codes_ptr, scales_ptr, data_ptr,
    STOCHASTIC: tl.constexpr, ROLE: tl.constexpr, tiled_ptr=None, top=None,
):  # fmt: skip
    """Quantise four groups of tokens, rotated, [features, 4, 8] each, into the operand [n_features, n_tokens padded to
    32], as FP8 where `top` [features] is given; returns the scale bytes, int32 [features, 4]. Joining them moves
    nothing; a tile that is regrouped before its rotation goes through registers."""
    FEATURES: tl.constexpr = v0.shape[0]
    v = tl.join(tl.join(v0, v2), tl.join(v1, v3)).permute(0, 3, 4, 1, 2).reshape(FEATURES * 4, 4, 8)
    local = tl.arange(0, FEATURES * 4)
    feature = first_feature + local // 4
    token_group = first_token // 32 + local % 4
    groups_per_row = tl.cdiv(n_tokens, 32)
    groups = feature.to(tl.int64) * groups_per_row + token_group
    inside = (feature < n_features) & (token_group < groups_per_row)
    if top is not None:
        top = tl.broadcast_to(top[:, None], (FEATURES, 4)).reshape(FEATURES * 4)
    byte = quantize_groups(
        v, 0, groups, inside, seed_ptr, codes_ptr, scales_ptr, None, data_ptr, "abs_max", None, STOCHASTIC, ROLE,
        tiled_ptr=tiled_ptr, per_row=groups_per_row, DIRECT=top is not None and stores_directly(), top=top,
    )  # fmt: skip
    return byte.reshape(FEATURES, 4)


@triton.jit
def rotated_columns(
    x_ptr, first_token, first_feature, n_tokens, n_features, row_stride, matrix, factor, FEATURES: tl.constexpr
):
    """v [FEATURES, 4, 8] of 32 tokens, read along rows: the product takes its operand transposed."""
    token = first_token + tl.arange(0, 32)
    feature = first_feature + tl.arange(0, FEATURES)
    x_at = token.to(tl.int64)[:, None] * row_stride + feature[None, :]
    x = tl.load(x_ptr + x_at, mask=(token < n_tokens)[:, None] & (feature < n_features)[None, :], other=0.0)
    return rotate(tl.trans(x), matrix, factor)


@triton.jit(do_not_specialize=["n_tokens"])
def quantize_columns_kernel(
    x_ptr, matrix_ptr, signs_ptr, seed_ptr, codes_ptr, scales_ptr, data_ptr, n_tokens, n_features, factor, row_stride,
    tiled_ptr, STOCHASTIC: tl.constexpr, ROLE: tl.constexpr, SIGN_ROLE: tl.constexpr,
    FEATURES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of 128 tokens of x [n_tokens, n_features], read along its rows, quantised along its columns."""
    matrix = load_rotation(matrix_ptr, signs_ptr, seed_ptr, SIGN_ROLE, 32, x_ptr.dtype.element_ty)
    tiles = tl.cdiv(n_features, FEATURES)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_tokens, 128) * tiles, tl.num_programs(0), num_stages=STAGES):
        token = tile // tiles * 128
        feature = tile % tiles * FEATURES
        v0 = rotated_columns(x_ptr, token, feature, n_tokens, n_features, row_stride, matrix, factor, FEATURES)
        v1 = rotated_columns(x_ptr, token + 32, feature, n_tokens, n_features, row_stride, matrix, factor, FEATURES)
        v2 = rotated_columns(x_ptr, token + 64, feature, n_tokens, n_features, row_stride, matrix, factor, FEATURES)
        v3 = rotated_columns(x_ptr, token + 96, feature, n_tokens, n_features, row_stride, matrix, factor, FEATURES)
        quantize_transposed(
            v0, v1, v2, v3, token, feature, n_tokens, n_features, seed_ptr, codes_ptr, scales_ptr, data_ptr,
            STOCHASTIC, ROLE, tiled_ptr,
        )  # fmt: skip


def programs(tiles: int, device: torch.device, per_multiprocessor: int) -> int:
    """How many programs walk over tiles: no more than fit the device at once."""
    return min(tiles, per_multiprocessor * multiprocessors(device))


def contiguous_rows(x: Tensor) -> Tensor:
    """x itself where its rows are contiguous, else a copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


@lru_cache
def inverse_root(width: int) -> float:
    """fl(width^-1/2) in float32."""
    return torch.tensor(width**-0.5, dtype=torch.float32, device="cpu").item()  # whatever the default device


def empty_codes(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uninitialised codes uint8 [rows, columns / 2] and scales uint8 [rows, columns / 32]."""
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
    return codes, torch.empty(rows, columns // 32, dtype=torch.uint8, device=device)


def empty_operand(
    rows: int, columns: int, operand: str, device: torch.device
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(codes, scales, data) that a backward quantiser writes for an operand format; None where it writes none."""
    if operand == "bf16":
        return None, None, torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
    if operand == "native" and tiles_scales(device):
        codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
        return codes, empty_tiled(rows, columns // 32, device), None
    return *empty_codes(rows, columns, device), None


def holds_rows(x: Tensor, direction: str) -> bool:
    """Whether programs hold whole rows, and so know their scales: without much of a tile lying idle, or where that is
    over sooner than the host launches a second kernel."""
    groups = x.shape[1] // 32
    limit = WHOLE_ROW_GROUPS[direction] * 2 // x.element_size()
    return 0 < groups <= limit and (8 * groups >= 7 * next_power_of_2(groups) or x.numel() <= SMALL)


def row_stages(width: int, element_size: int) -> int:
    """Pipeline stages of the row quantiser: 99 KiB of shared memory are all that some GPUs have."""
    return STAGES if width * element_size < 512 else 2


def empty_fp8(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uninitialised FP8 data as int32 [rows, columns / 4], four to a word, and row scales float32 [rows]."""
    data = torch.empty(rows, columns // 4, dtype=torch.int32, device=device)
    return data, torch.empty(rows, dtype=torch.float32, device=device)


def finish_operand(codes: Tensor | None, scales: Tensor | None, data: Tensor | None, operand: str) -> Operand:
    """The (data, scale) pair that a GEMM reads, from what a quantiser wrote."""
    if data is not None:
        return data, torch.empty(0, dtype=torch.float32, device=data.device)
    assert codes is not None
    assert scales is not None
    return expand(codes, scales, check_codes=False) if operand == "fp8" else (codes, scales)


def scale_pointers(scales: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """`scales_ptr` and `tiled_ptr` of the kernels: scales by rows have two dimensions, tiled ones four."""
    return (None, scales) if scales is not None and scales.dim() == 4 else (scales, None)


def words(codes: Tensor | None) -> Tensor | None:
    """Codes as 32-bit words of 8, which is how kernels store them."""
    return None if codes is None else codes.view(torch.int32)


def quantize_forward(
    x: Tensor, *, config: QuartetConfig, mask: bool, operand: str = "packed"
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Rotate and project x [M, K], float32, bfloat16 or float16, K a multiple of the rotation's width.

    Returns codes uint8 [M, K/2], scales uint8 [M, K/32], clip mask int32 [M, K/32] or None, and the GEMM operand:
    None, None for ``operand="packed"`` (codes and scales are the operand); ``"native"``: None and the scales once more,
    tiled, or None where they are read as they are; ``"fp8"``: float8_e5m2 [M, K] and a float32
    [M] of powers of two; ``"bf16"``: bfloat16 [M, K] of ``code * scale`` and an empty tensor.
    """
    rows, columns = x.shape
    x = contiguous_rows(x)
    codes, scales = empty_codes(rows, columns, x.device)
    mask_words = torch.empty(rows, columns // 32, dtype=torch.int32, device=x.device) if mask else None
    data = row_scale = None
    whole = operand == "fp8" and holds_rows(x, "forward")
    if operand == "bf16":
        data = torch.empty(rows, columns, dtype=torch.bfloat16, device=x.device)
    elif whole:
        data, row_scale = empty_fp8(rows, columns, x.device)
    matrix = rotation_matrix(config.transform_init, config.hadamard_group_size, x.device, x.dtype)
    quest = config.forward_method == "quest"
    method = (config.statistic, config.scale_rule) if quest else ("abs_max", None)
    constants = (*method, False, 0, None)
    tiled = empty_tiled(rows, columns // 32, x.device) if operand == "native" and tiles_scales(x.device) else None
    _launch_rows(x, matrix, None, None, codes, scales, mask_words, data, row_scale, FORWARD_PROGRAMS, constants, tiled)
    if whole:
        assert data is not None
        return codes, scales, mask_words, data.view(torch.float8_e5m2), row_scale
    if operand == "fp8":
        # With the rule `floor`, tiny groups get codes of zero under a scale that is not tiny.
        return codes, scales, mask_words, *expand(codes, scales, check_codes=quest and config.scale_rule == "floor")
    if operand == "bf16":
        return codes, scales, mask_words, data, x.new_empty(0, dtype=torch.float32)
    return codes, scales, mask_words, None, tiled


def _launch_rows(
    x: Tensor,
    matrix: Tensor | None,
    signs: Tensor | None,
    seed: Tensor | None,
    codes: Tensor | None,
    scales: Tensor | None,
    mask: Tensor | None,
    data: Tensor | None,
    row_scale: Tensor | None,
    per_multiprocessor: int,
    constants: tuple[str | None, str | None, bool, int, int | None],
    tiled: Tensor | None = None,
) -> None:
    """`constants` are those of the kernel from METHOD to SIGN_ROLE."""
    rows, n_groups = x.shape[0], x.shape[1] // 32
    if rows * n_groups == 0:
        return
    width = 0 if matrix is None else matrix.shape[0]
    smallest = 64 * max(width, 64) // 32  # a product needs 64 rows for the tensor cores of Hopper
    contiguous = x.is_contiguous()  # else its strides matter, which compiles another kernel
    per_row = 1
    if row_scale is None:
        tile = max(min(GROUPS_PER_TILE, next_power_of_2(rows * n_groups)), smallest)
        tiles = cdiv(rows * n_groups, tile)
    else:
        per_row = next_power_of_2(n_groups)
        contiguous = contiguous and per_row == n_groups
        tile = max(GROUPS_PER_TILE, per_row, smallest)
        tiles = cdiv(rows, tile // per_row)
    # Three programs of the forward's 4 warps of many registers fit a multiprocessor, but only two of 8 warps of fewer.
    groups_per_warp = 64 if row_scale is not None and codes is not None and width <= 32 else 32
    mask_bytes = None if mask is None else mask.view(torch.uint8)
    launch(
        quantize_rows_kernel,
        x.device,
        programs(tiles, x.device, per_multiprocessor),
        (x, matrix, signs, seed, words(codes), scales, mask_bytes, data, row_scale)
        + (rows, n_groups, inverse_root(max(width, 1)), 0 if contiguous else x.stride(0), tiled),
        (contiguous, width, *constants, tile, per_row, row_stages(width, x.element_size())),
        NUM_WARPS if INTERPRET else max(NUM_WARPS, tile // groups_per_warp),
    )


def quantize_backward(
    x: Tensor,
    *,
    signs: Tensor | None = None,
    sign_role: int | None = None,
    seed: Tensor | None = None,
    role: int = 0,
    rounding: str = "nearest",
    transpose: bool = False,
    operand: str = "packed",
) -> Operand:
    """Rotate x [M, N] along N, or x.T along M padded with zeros to a multiple of 32, and quantise it by abs-max.

    ``signs`` float32 [32] are used as given, else ``sign_role`` draws them from ``seed`` int64 [3], else they are +1.
    The operand leaves out the factor 4/3: ``"packed"``: codes and scales; ``"fp8"`` and ``"bf16"`` as in
    `quantize_forward`, and no codes are kept.
    """
    rows, columns = x.shape
    x = contiguous_rows(x)
    stochastic = rounding == "stochastic"
    matrix = rotation_matrix("hadamard", BACKWARD_GROUP_SIZE, x.device, x.dtype)
    sign_role = sign_role if signs is None else None
    rounding_constants = (stochastic, role if stochastic else 0, sign_role)
    if not transpose:
        constants = ("abs_max", None, *rounding_constants)
        if operand == "fp8" and holds_rows(x, "backward"):  # no codes are needed
            fp8, row_scale = empty_fp8(rows, columns, x.device)
            _launch_rows(x, matrix, signs, seed, None, None, None, fp8, row_scale, PROGRAMS[rounding], constants)
            return fp8.view(torch.float8_e5m2), row_scale
        codes, scales, data = empty_operand(rows, columns, operand, x.device)
        plain, tiled = scale_pointers(scales)
        _launch_rows(x, matrix, signs, seed, codes, plain, None, data, None, PROGRAMS[rounding], constants, tiled)
        return finish_operand(codes, scales, data, operand)
    codes, scales, data = empty_operand(columns, cdiv(rows, 32) * 32, operand, x.device)
    if x.numel() > 0:
        plain, tiled = scale_pointers(scales)
        launch(
            quantize_columns_kernel,
            x.device,
            programs(cdiv(rows, TOKENS_PER_TILE) * cdiv(columns, FEATURES_PER_TILE), x.device, TRANSPOSED_PROGRAMS),
            (x, matrix, signs, seed, words(codes), plain, data)
            + (rows, columns, inverse_root(BACKWARD_GROUP_SIZE), x.stride(0), tiled),
            (*rounding_constants, FEATURES_PER_TILE, TRANSPOSED_STAGES),
            NUM_WARPS,
        )
    return finish_operand(codes, scales, data, operand)
