"""Rotations along the axis a GEMM contracts: block Hadamard matrices without their factor."""

from functools import lru_cache

import torch
from torch import Tensor

from .config import parse_config

BACKWARD_GROUP_SIZE = 32
"""Backward rotations are this wide whatever the forward's are."""


def hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix of +-1, float32 [size, size], size a power of two."""
    matrix = torch.ones(1, 1, device="cpu")  # whatever the default device
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix


def rotation_matrix(
    transform_init: str, group_size: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor | None:
    """The matrix of +-1, [group_size, group_size], that a block of x is multiplied with from the right.

    ``v = (x @ H) * group_size**-0.5`` rotates and ``x = (v @ H.T) * group_size**-0.5`` rotates back.
    ``gsr`` sorts the Hadamard matrix's columns by their number of sign changes (as fp-quant does); ``identity`` is
    None: no product at all. The tensor is shared by all layers of a device and never saved.
    """
    if transform_init == "identity":
        return None
    make = _make_matrix if torch.compiler.is_compiling() or faking() else _matrix
    return make(transform_init, group_size, device, dtype)


def faking() -> bool:
    """Whether tensors made now are a tracer's, without data, which nothing may keep."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def _make_matrix(transform_init: str, group_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # A tensor first made in validation must not be an inference tensor: a later fit could not save it for backward.
    with torch.inference_mode(False):
        matrix = hadamard(group_size)
        if transform_init == "gsr":
            changes = (matrix[1:] != matrix[:-1]).sum(0)
            matrix = matrix[:, changes.argsort(stable=True)]
        return matrix.to(device=device, dtype=dtype).contiguous()


_matrix = lru_cache(maxsize=64)(_make_matrix)


@torch.compiler.assume_constant_result
def make_matrices(config: str, device: torch.device) -> None:
    """Make now, while a layer is compiled, what layers of that `QuartetConfig.text` will read on a device, whatever
    their dtype. It takes the text since with ``dynamic=True`` the compiler knows integers only as symbols.

    Who records CUDA graphs (``torch.compile`` in mode ``reduce-overhead``) gives the first run memory of its own, in
    which nothing may be made that lives on.
    """
    if faking():
        return
    options = parse_config(config)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _matrix("hadamard", BACKWARD_GROUP_SIZE, device, dtype)
        if options.transform_init != "identity":
            _matrix(options.transform_init, options.hadamard_group_size, device, dtype)
