"""Triton kernels run in its CPU interpreter where there is no GPU; that is decided when they are decorated."""

import os
import signal

import torch

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import interp_compat  # noqa: F401
