"""Results of many runs in one JSON file, which several processes may add to."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quartet_kernels.files import replacing

Result = dict[str, Any]


def read_results(file: Path) -> list[Result]:
    """What the file holds; nothing where there is none.

    Raises:
        ValueError: If it is not JSON.
    """
    if not file.exists():
        return []
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} holds no results ({error}): delete it, or name another file.") from error


def add_result(file: Path, result: Result) -> None:
    """Add one; a reader sees the file without it or with it."""
    change_results(file, lambda results: [*results, result])


def change_results(file: Path, change: Callable[[list[Result]], list[Result]]) -> None:
    """Put what a function makes of the results in their place, while no other process does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = change(read_results(file))
        with replacing(file) as path:
            path.write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")
