"""bench and doctor."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from quartet_kernels import bench, doctor
from quartet_kernels.__main__ import main

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU")


@cpu_only
def test_bench_compares_one_linear_with_nn_linear_and_writes_json(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert main(["bench", "--shapes", "64x64x32", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert [row["linear"] for row in report["linears"]] == [
        "nn.Linear, float32",
        "quartet",
        "quartet_stochastic",
        "mxfp8_backward",
        "bf16_backward",
    ]
    assert all(row["both ms"] > 0 for row in report["linears"])
    assert "nn.Linear, float32" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [file]


def test_doctor_passes_and_prints_json(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert torch.__version__.startswith(report["versions"]["torch"])
    assert report["devices"][0]["self-test"]["passed"]
    assert "reference" in report["devices"][0]["backends"]


def test_doctor_fails_where_numbers_are_wrong(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "quartet_linear", lambda x, *rest, **options: (x * float("nan")).sum() + rest[0].sum())
    assert main(["doctor"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--shapes", "64x64"], "write tokens x in_features x out_features"),
        (["bench", "--shapes", "64x0x32"], "write tokens x in_features x out_features"),
        (
            ["bench", "--shapes", "64x64x64", "64x30x32"],
            "'64x30x32': in_features and out_features must be multiples of",
        ),
        (["doctor", "--json", "/nonexistent/report.json"], "does not exist"),
        (["doctor", "--json", "."], "--json: . is a folder; name a file."),
        (["train"], "invalid choice"),
    ],
)
def test_wrong_options_get_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_tables_have_a_line_for_every_row():
    row = {"linear": "x", "shape": "1x2x3", "both ms": 1.0, "ratio": 1.0}
    report = {
        "device": "d",
        "backend": "b",
        "versions": {},
        "copy TB/s": 1.0,
        "kernels": [{"kernel": "k", "ms": 2.0}],
        "decode": [{"shape": "64x32", "tokens": 1, "decode us": 2.0}],
        "linears": [row, row],
    }
    assert len(bench.tables(report).splitlines()) == 2 + 1 + 2 + 1 + 3 + 1 + 2


def test_hardware_page_has_the_estimates():
    root = Path(__file__).parents[2]
    table = runpy.run_path(str(root / "benchmarks" / "estimate.py"))["table"]()
    assert table in (root / "docs" / "hardware.md").read_text(), "run python benchmarks/estimate.py"
