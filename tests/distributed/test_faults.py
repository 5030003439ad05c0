"""A rank that dies ends the job; the job goes on from its last checkpoint."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BOUND = 120  # seconds, most of them for starting two processes on a busy machine


def run(folder, *options):
    root = Path(__file__).parents[2]
    paths = [root / "tests" / "distributed", root, root / "kernels"]
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE")}
    folder.mkdir(exist_ok=True)
    start = time.monotonic()
    script = Path(__file__).with_name("killed.py")
    done = subprocess.run(
        [sys.executable, script, folder, *options],
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))},
        timeout=BOUND,
        capture_output=True,
        text=True,
    )
    return done, time.monotonic() - start


def losses(folder, rank):
    lines = (folder / f"losses{rank}.jsonl").read_text().splitlines()
    return dict(json.loads(line) for line in lines)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_ends_the_job_which_then_resumes(tmp_path, rank):
    done, _ = run(tmp_path / "killed", "--kill", str(rank))
    assert done.returncode != 0
    assert [path.name for path in (tmp_path / "killed").glob("last-*")] == ["last-step=2.ckpt"]
    done, _ = run(tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    done, _ = run(tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert len(losses(tmp_path / "whole", rank)) == 6
        assert losses(tmp_path / "killed", rank) == losses(tmp_path / "whole", rank)
