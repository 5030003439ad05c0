"""`examples/language_model/study`: tokens made of a source archive, and paired runs that go on where they stopped."""

import argparse
import io
import json
import runpy
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

STUDY = Path(__file__).parents[2] / "examples" / "language_model" / "study"


def test_tokens_are_those_of_the_files_and_some_files_are_held_out(tmp_path: Path) -> None:
    script = runpy.run_path(str(STUDY / "prepare.py"))
    texts = {f"linux/dir/{i}.c": f"int variable_{i} = {i};\n" * 20 for i in range(100)}
    texts |= {"linux/short.c": "int x;", "linux/other.h": "int y;\n" * 100, "linux/a.rst": "Words.\n" * 50}
    archive = tmp_path / "linux.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        for name, text in texts.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    found = script["read_sources"](archive)
    expected = [text for name, text in texts.items() if not name.endswith(("short.c", ".h"))]
    assert sorted(found) == sorted(expected)

    sizes = {"tokenizer_characters": 20_000, "vocabulary": 300, "tokens": 10**6, "validation_tokens": 10**6}
    tokenizer, tokens = script["tokenize"](found, argparse.Namespace(**sizes))
    assert tokens["train"].dtype == torch.int16
    separator = tokenizer.token_to_id("<|endoftext|>")
    assert (tokens["validation"] == separator).sum() == 2
    for name, part in (("validation", found[:2]), ("train", found[2:])):
        assert tokenizer.decode(tokens[name].tolist(), skip_special_tokens=True) == "".join(part)
    few = argparse.Namespace(**{**sizes, "tokens": 500})
    assert torch.equal(script["tokenize"](found, few)[1]["train"], tokens["train"][:500])


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    tokens = {
        name: torch.randint(0, 64, (size,), dtype=torch.int16, generator=generator)
        for name, size in (("train", 230), ("validation", 300))  # four steps take more than one epoch
    }
    file = tmp_path / "tokens.safetensors"
    save_file(tokens, file, metadata={"source": "random 1", "vocabulary": "64"})
    small = "--steps 4 --batch 2 --sequence 32 --width 128 --validation_batches 2 --eager".split()
    return [*small, "--tokens", str(file), "--out", str(tmp_path / "out")]


def test_paired_runs_share_all_but_the_numerics_and_go_on(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def study(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["study.py", *arguments, *more])
        runpy.run_path(str(STUDY / "study.py"), run_name="__main__")
        return capsys.readouterr().out

    study("--runs", "bf16", "ends_in_bf16", "--seeds", "1")
    file = tmp_path / "out" / "runs.json"
    first = json.loads(file.read_text())
    bf16, ours = first
    assert (bf16["run"], ours["run"]) == ("bf16", "ends_in_bf16")
    assert len(bf16["losses"]) == 4
    assert bf16["losses"][0] == pytest.approx(ours["losses"][0], abs=0.02)  # the same start and data
    assert bf16["val_loss"] != ours["val_loss"]

    text = study("--runs", "bf16", "ends_in_bf16", "--seeds", "2")
    results = json.loads(file.read_text())
    assert results[:2] == first
    assert [(result["run"], result["seed"]) for result in results[2:]] == [("bf16", 1), ("ends_in_bf16", 1)]
    gaps = [results[i + 1]["val_loss"] - results[i]["val_loss"] for i in (0, 2)]
    assert text.splitlines()[-1].endswith(f"{sum(gaps) / 2:+.4f} ± {abs(gaps[0] - gaps[1]) / 2:.4f} |")

    masked = tmp_path / "masked"
    study("--runs", "quartet", "no_mask", "--seeds", "1", "--out", str(masked))
    quartet, unmasked = json.loads((masked / "runs.json").read_text())
    assert quartet["losses"][0] == unmasked["losses"][0]  # masks change gradients only
    assert quartet["losses"][1:] != unmasked["losses"][1:]

    averaged = tmp_path / "averaged"
    study("--runs", "quartet", "quartet_ema", "quartet_to_zero", "--seeds", "1", "--out", str(averaged))
    quartet, ema, to_zero = json.loads((averaged / "runs.json").read_text())
    assert ema["losses"] == quartet["losses"]  # the average is only validated
    assert ema["val_loss"] != quartet["val_loss"]
    assert to_zero["losses"][:2] == quartet["losses"][:2]
    assert to_zero["losses"][3] != quartet["losses"][3]

    with pytest.raises(SystemExit, match="other settings"):
        study("--steps", "5")
    other = ("--out", str(tmp_path / "other"))
    with pytest.raises(SystemExit, match="holds 0 sequences of 100000 tokens to train with"):
        study("--sequence", "100000", *other)
    with pytest.raises(SystemExit, match="9 of the 10 to validate with: prepare more"):
        study("--validation_batches", "5", *other)
    for wrong in (("--steps", "2"), ("--width", "64"), ("--width", "200")):
        with pytest.raises(SystemExit, match="at least 3 steps and a multiple of 128"):
            study(*wrong, *other)
    tokens = {name: torch.zeros(500, dtype=torch.int16) for name in ("train", "validation")}
    save_file(tokens, tmp_path / "zeros.safetensors", metadata={"source": "random 1", "vocabulary": "64"})
    with pytest.raises(SystemExit, match="runs with other tokens than those of"):
        study("--runs", "bf16", "--seeds", "3", "--tokens", str(tmp_path / "zeros.safetensors"))
