"""Files that appear whole."""

import os

import pytest

from quartet_kernels.files import replacing


def test_a_file_appears_whole_with_the_usual_permissions(tmp_path):
    target, other = tmp_path / "a.json", tmp_path / "b.json"
    other.touch()
    target.write_text("old")
    with replacing(target) as path:
        path.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert os.stat(target).st_mode == os.stat(other).st_mode
    assert {file.name for file in tmp_path.iterdir()} == {"a.json", "b.json"}


def _write_half(target):
    with replacing(target) as path:
        path.write_text("half")
        raise RuntimeError("no more")


def test_a_failure_leaves_what_was_there(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="no more"):
        _write_half(target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
