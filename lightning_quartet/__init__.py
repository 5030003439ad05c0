"""Train with MXFP4 matrix products, forward and backward: Quartet (arXiv 2505.14669) for PyTorch Lightning."""

from lightning_quartet.callbacks import QuartetMonitor, QuartetQAT
from lightning_quartet.convert import ConversionReport, convert_to_quartet, revert_from_quartet
from lightning_quartet.linear import QuartetLinear, set_quartet_step
from lightning_quartet.packed import PackedQuartetLinear, pack_quartet
from lightning_quartet.precision import QuartetPrecision
from lightning_quartet.strategies import QuartetFSDP
from quartet_kernels import QuartetConfig

__version__ = "0.1.0"

__all__ = [
    "ConversionReport",
    "PackedQuartetLinear",
    "QuartetConfig",
    "QuartetFSDP",
    "QuartetLinear",
    "QuartetMonitor",
    "QuartetPrecision",
    "QuartetQAT",
    "convert_to_quartet",
    "pack_quartet",
    "revert_from_quartet",
    "set_quartet_step",
]
