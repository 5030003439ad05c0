"""`examples/plot.py` draws the results that are in the repository."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_results_are_drawn_under_the_names_in_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["plot.py", "--out", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "plot.py"), run_name="__main__")
    drawn = {file.name for file in tmp_path.iterdir()}
    assert "recipes.png" in drawn
    assert drawn <= {file.name for file in (EXAMPLES.parent / "docs" / "images").iterdir()}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.iterdir())
