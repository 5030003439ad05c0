from collections.abc import Iterator

import pytest
import torch
from processes import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two processes; see `processes.Ranks`."""
    pool = Ranks(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def alone() -> Iterator[Ranks]:
    """One process that can be a world of its own."""
    pool = Ranks(1)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
