"""Rotations along the axis a GEMM contracts: block Hadamard matrices without their factor."""

from functools import lru_cache

import torch
from torch import Tensor

BACKWARD_GROUP_SIZE = 32
"""Backward rotations are this wide whatever the forward's are."""


def hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix of +-1, float32 [size, size], size a power of two."""
    matrix = torch.ones(1, 1, device="cpu")  # whatever the default device
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix


@lru_cache(maxsize=64)
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
    # A tensor first made in validation must not be an inference tensor: a later fit could not save it for backward.
    with torch.inference_mode(False):
        matrix = hadamard(group_size)
        if transform_init == "gsr":
            changes = (matrix[1:] != matrix[:-1]).sum(0)
            matrix = matrix[:, changes.argsort(stable=True)]
        return matrix.to(device=device, dtype=dtype).contiguous()
