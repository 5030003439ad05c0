"""Triton kernels run in its CPU interpreter where there is no GPU; that is decided when they are decorated."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import interp_compat  # noqa: F401
