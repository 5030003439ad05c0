"""MXFP4 training kernels by the Quartet method: torch and Triton only, usable without Lightning."""

from .backends import available_backends
from .config import RECIPES, QuartetConfig
from .functional import mxfp4_matmul, quantize_mxfp4
from .linear import quartet_linear
from .mxfp4 import MXFP4Tensor, unpack_mask

__all__ = [
    "RECIPES",
    "MXFP4Tensor",
    "QuartetConfig",
    "available_backends",
    "mxfp4_matmul",
    "quantize_mxfp4",
    "quartet_linear",
    "unpack_mask",
]
