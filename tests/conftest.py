"""Triton kernels run in its CPU interpreter where there is no GPU; that is decided when they are decorated."""

import os
import signal

import pytest
import torch

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import interp_compat  # noqa: F401


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """No test's data depends on the tests before it."""
    torch.manual_seed(0)
