"""Files that appear whole."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Where to write a file that takes ``target``'s place when the block ends, and goes away when it fails.

    It lies in a folder of its own beside the target: it has the target's name and the permissions of any new file.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        temporary = Path(folder) / target.name
        yield temporary
        os.replace(temporary, target)
