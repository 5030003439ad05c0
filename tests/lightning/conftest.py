import signal
import warnings
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _clean_process() -> Iterator[None]:
    """One thread (tiny tensors gain nothing from more), and what Lightning changes in the process put back."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning", category=UserWarning)
        yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)  # after Ctrl-C the Trainer ignores further ones
