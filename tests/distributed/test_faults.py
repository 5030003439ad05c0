"""A rank that dies ends the job; the job goes on from its last checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BOUND = 120  # seconds, most of them for starting two processes on a busy machine


def run(folder, *options):
    root = Path(__file__).parents[2]
    paths = [root / "tests" / "distributed", root, root / "kernels"]
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE")}
    folder.mkdir(exist_ok=True)
    script = Path(__file__).with_name("killed.py")
    return subprocess.run(
        [sys.executable, script, folder, *options],
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))},
        timeout=BOUND,
        capture_output=True,
        text=True,
    )


def losses(folder, rank):
    lines = (folder / f"losses{rank}.jsonl").read_text().splitlines()
    return dict(json.loads(line) for line in lines)


def check_resumes(folder, rank, *options):
    done = run(folder / "killed", "--kill", str(rank), *options)
    assert done.returncode != 0
    assert [path.name for path in (folder / "killed").glob("last-*")] == ["last-step=2.ckpt"]
    done = run(folder / "killed", *options)
    assert done.returncode == 0, done.stderr
    done = run(folder / "whole", *options)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert len(losses(folder / "whole", rank)) == 6
        assert losses(folder / "killed", rank) == losses(folder / "whole", rank)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_ends_the_job_which_then_resumes(tmp_path, rank):
    check_resumes(tmp_path, rank)
