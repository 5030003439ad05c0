"""Results of many runs in one JSON file, which several processes may add to."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

from quartet_kernels.files import replacing

Result = dict[str, Any]


def read_results(file: Path) -> list[Result]:
    """What the file holds; nothing where there is none."""
    return json.loads(file.read_text()) if file.exists() else []


def add_result(file: Path, result: Result) -> None:
    """Add one; a reader sees the file without it or with it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = [*read_results(file), result]
        with replacing(file) as path:
            path.write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")
