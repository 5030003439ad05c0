"""The table in docs/resources.md: registers, shared and tensor memory of every kernel on every GPU, compiled here.

python tests/kernels/resources.py            # writes it anew
python tests/kernels/resources.py --check    # compares it instead; exit status 1 if it is not what compiles today
"""

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("crosscompile.py")
PAGE = ROOT / "docs" / "resources.md"
INTRODUCTION = """\
# Resources of the kernels

Each kernel in its default configuration, compiled by Triton {triton} on a machine without a GPU: registers a thread /
KiB of shared memory a program / columns of tensor memory where there is one; `s` and bytes where registers are spilled.
Written by `python tests/kernels/resources.py`; a test compiles the same, looks for the matrix instructions that
[Hardware](hardware.md) names, and compares this page where the version of Triton is this one. Nothing here was run.

"""


def collect(timeout: float = 600) -> list[dict[str, Any]]:
    """The rows of crosscompile.py, from processes of their own: in this one the interpreter may have replaced Triton's
    compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen([sys.executable, SCRIPT, *part], env=environment, stdout=-1, stderr=-1, text=True)
        for part in (["--part", "1/2"], ["--part", "2/2"], ["--amd"])
    ]
    rows = []
    for process in processes:
        output, errors = process.communicate(timeout=timeout)
        if process.returncode:
            raise RuntimeError(f"crosscompile.py ended with {process.returncode}: {errors[-3000:]}")
        rows += [json.loads(line) for line in output.splitlines()]
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    """docs/resources.md from those rows."""

    def cell(row: dict[str, Any]) -> str:
        parts = [str(row["registers"]), f"{row['shared'] / 1024:.0f}"]
        if row["tensor_memory"]:
            parts.append(str(row["tensor_memory"]))
        return " / ".join(parts) + (f" s{row['stack']}" if row["stack"] else "")

    architectures = sorted({row["arch"] for row in rows}, key=lambda arch: (arch.startswith("gfx"), len(arch), arch))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        # The operand's format follows from the architecture; an epilogue or a number of tokens makes another kernel.
        epilogue = row["epilogue"] if any(word in row["epilogue"] for word in ("ward", "tokens", "group")) else ""
        cells.setdefault((row["kernel"], epilogue), {})[row["arch"]] = cell(row)
    names = [arch if arch.startswith("gfx") else f"{arch[:-1]}.{arch[-1]}" for arch in architectures]
    lines = [f"| kernel | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for (kernel, epilogue), by_architecture in sorted(cells.items()):
        found = " | ".join(by_architecture.get(arch, "") for arch in architectures)
        lines.append(f"| {kernel} {epilogue.replace('_', ' ')}".rstrip() + f" | {found} |")
    return INTRODUCTION.format(triton=version("triton")) + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare the page instead of writing it")
    check = parser.parse_args().check
    text = page(collect())
    if check:
        return int(PAGE.read_text() != text)
    unfinished = PAGE.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
