"""Text to packed sequences: documents, tokenizer cache, windows, errors."""

import lzma
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from lightning_quartet.recipes import TextDataModule
from lightning_quartet.recipes.text import SEPARATOR, PackedSequences

WORDS = "the government of the people by the people for the people shall not perish from the earth".split()


def corpus(documents: int = 6, lines: int = 12) -> str:
    parts = []
    for number in range(documents):
        body = "\n".join(" ".join(WORDS[(number + line + i) % len(WORDS)] for i in range(9)) for line in range(lines))
        parts.append(f"# {1790 + number}, President é{number}\n\n{body}\n")
    return "\n".join(parts)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "speeches.txt.xz"
    file.write_bytes(lzma.compress(corpus().encode()))
    return file


def module(path: Path, **options: object) -> TextDataModule:
    options = {
        "vocabulary_size": 300,
        "sequence_length": 16,
        "batch_size": 2,
        "validation_documents": 2,
        "cache_dir": str(path.parent / "cache"),
    } | options
    return TextDataModule(str(path), **options)  # type: ignore[arg-type]


def ready(path: Path, **options: object) -> TextDataModule:
    data = module(path, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def decoded(data: TextDataModule, name: str) -> str:
    assert data.tokenizer is not None
    return data.tokenizer.decode(data._sets[name].stream.tolist(), skip_special_tokens=False)


def test_last_documents_are_for_validation_and_text_survives(text_file: Path) -> None:
    data = ready(text_file)
    documents = corpus().split("\n# ")
    documents = [documents[0], *("# " + d for d in documents[1:])]
    # split() took the newline in front of each heading
    assert decoded(data, "train") == "".join(SEPARATOR + d for d in documents[:4])
    assert decoded(data, "validation") == "".join(SEPARATOR + d for d in documents[4:])


def test_batches_are_shifted_windows_of_token_ids(text_file: Path) -> None:
    data = ready(text_file)
    batch = next(iter(data.train_dataloader()))
    assert batch.shape == (2, 17)
    assert batch.dtype == torch.int64
    assert batch.max() < data.vocabulary_in_use <= 300
    assert sum(len(b) for b in data.val_dataloader()) == len(data._sets["validation"])


def test_windows_predict_each_token_once() -> None:
    windows = PackedSequences(torch.arange(20), sequence_length=6)
    assert [w.tolist() for w in windows] == [list(range(s, s + 7)) for s in (0, 6, 12)]
    assert len(PackedSequences(torch.arange(6), 6)) == 0
    assert len(PackedSequences(torch.arange(7), 6)) == 1


def test_tokenizer_is_trained_once_and_cached_by_its_inputs(text_file: Path) -> None:
    ready(text_file)
    cache = text_file.parent / "cache"
    (file,) = cache.iterdir()  # no temporary file is left
    written = file.stat().st_mtime_ns
    ready(text_file, batch_size=1)
    assert [f.stat().st_mtime_ns for f in cache.iterdir()] == [written]
    ready(text_file, vocabulary_size=290)
    text_file.write_bytes(lzma.compress(corpus(documents=7).encode()))
    ready(text_file)
    assert len(list(cache.iterdir())) == 3


def test_tokenizer_sees_no_validation_text(tmp_path: Path) -> None:
    file = tmp_path / "plain.txt"
    file.write_text(corpus(documents=3) + "\n# 1800, Zyzzyva\n\n" + "zyzzyva " * 200, encoding="utf-8")
    data = ready(file, validation_documents=1)
    assert data.tokenizer is not None
    assert not any("zyz" in token for token in data.tokenizer.get_vocab())


def test_fraction_splits_any_text(tmp_path: Path) -> None:
    file = tmp_path / "novel.txt"
    file.write_text(" ".join(WORDS * 40), encoding="utf-8")
    data = ready(file, validation_documents=None, validation_fraction=0.25)
    whole = decoded(data, "train") + decoded(data, "validation")
    assert whole.replace(SEPARATOR, "") == file.read_text()
    assert abs(len(decoded(data, "validation")) / len(whole) - 0.25) < 0.02


def test_a_tokenizer_of_a_model_folder_is_used(text_file: Path) -> None:
    cached = ready(text_file).tokenizer
    assert cached is not None
    folder = text_file.parent / "model"
    folder.mkdir()
    cached.save(str(folder / "tokenizer.json"))
    data = ready(text_file, tokenizer=str(folder), cache_dir="unused")
    assert data.tokenizer is not None
    assert data.tokenizer.to_str() == cached.to_str()
    assert not Path("unused").exists()

    plain = Tokenizer.from_str(cached.to_str().replace(SEPARATOR, "<|other|>"))
    plain.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=re.escape("no token '<|endoftext|>'")):
        ready(text_file, tokenizer=str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.5}, "validation_fraction=1.5 must lie between 0 and 1"),
        ({"validation_documents": None}, "validation_documents"),
        ({"validation_documents": 0}, "validation_documents"),
        ({"vocabulary_size": 100}, "vocabulary_size=100 must be at least 257"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_bad_numbers(text_file: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(text_file, **options)


def test_missing_or_unsuitable_files(text_file: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no text file '.*nowhere.txt' \(working folder"):
        module(text_file.parent / "nowhere.txt").prepare_data()
    with pytest.raises(FileNotFoundError, match="neither a tokenizer.json nor a folder"):
        module(text_file, tokenizer="nowhere")
    with pytest.raises(ValueError, match="has 6 documents .* too few for validation_documents=6"):
        ready(text_file, validation_documents=6)
    with pytest.raises(ValueError, match="0 train sequences of 100000 tokens"):
        ready(text_file, sequence_length=100000)
