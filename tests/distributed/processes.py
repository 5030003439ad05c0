"""Two processes, connected by gloo, that live as long as the tests: each test sends them a function to run."""

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
TIMEOUT = 240


def _serve(rank: int, world_size: int, port: int, connection: Connection) -> None:
    sys.path[:0] = [
        str(TESTS / "distributed"),
        str(TESTS / "lightning"),
        str(TESTS.parent),
        str(TESTS.parent / "kernels"),
    ]
    # As torchrun would start it: Lightning then starts no processes itself.
    os.environ.update(
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, options = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            result = (True, function(**options))
        except BaseException as error:
            result = (False, (type(error).__name__, str(error), traceback.format_exc()))
        connection.send_bytes(pickle.dumps(result))


class Failure(Exception):
    """What a function raised in the processes; ``name`` is the exception's class."""

    def __init__(self, name: str, message: str, text: str) -> None:
        super().__init__(f"{name}: {message}\n{text}")
        self.name, self.message = name, message


class Ranks:
    """``ranks(function, **options)`` runs a function of a module in every process and returns all results."""

    def __init__(self, world_size: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], **options: Any) -> list[Any]:
        for connection in self.connections:
            connection.send_bytes(pickle.dumps((function, options)))
        results = []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(TIMEOUT):
                self.close()
                pytest.exit(f"rank {rank} does not answer")
            results.append(pickle.loads(connection.recv_bytes()))
        for done, result in results:
            if not done:
                raise Failure(*result)
        return [result for _, result in results]

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(2)
            process.kill()
