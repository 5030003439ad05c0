"""Plain text as packed token sequences."""

from __future__ import annotations

import hashlib
import lzma
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from quartet_kernels.files import replacing

SEPARATOR = "<|endoftext|>"


class PackedSequences(Dataset[Tensor]):
    """Windows of ``sequence_length + 1`` tokens over one stream; neighbours share one token, so each is predicted once.

    Args:
        stream: int64 token ids ``[n]``; what does not fill a window at the end is left out.
        sequence_length: Tokens that a window predicts.
    """

    def __init__(self, stream: Tensor, sequence_length: int) -> None:
        self.stream = stream
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return max(0, (len(self.stream) - 1) // self.sequence_length)

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)  # ends iteration
        start = index * self.sequence_length
        return self.stream[start : start + self.sequence_length + 1]


class TextDataModule(LightningDataModule):
    """A text file, tokenized and packed into batches ``[batch_size, sequence_length + 1]`` of int64 token ids.

    The text is split into documents at lines that begin with ``document_heading``; each document begins with the token
    ``<|endoftext|>``. The last documents are for validation (and test and predict). A byte-level BPE tokenizer is
    trained on the training documents on first use and kept in ``cache_dir``.

    Args:
        path: A UTF-8 text file, plain or compressed as ``.xz``. A relative path is looked for in the working folder.
        vocabulary_size: Tokens of the BPE tokenizer; ignored when ``tokenizer`` is given.
        sequence_length: Tokens that a sequence predicts. In a multiple of 32 no padding is needed in the backward pass.
        batch_size: Sequences in a batch.
        document_heading: What a line that starts a document begins with; empty for one single document.
        validation_documents: How many documents at the end are for validation.
        validation_fraction: Instead of documents: the part of the text's characters, at its end, for validation.
        tokenizer: A ``tokenizer.json`` or a local Hugging Face folder with one, used instead of training a tokenizer.
        cache_dir: Folder of the trained tokenizer.
        num_workers: Of the data loaders.

    Raises:
        ValueError: For a number out of range, a text with too few documents, or a tokenizer without ``<|endoftext|>``.
        FileNotFoundError: When ``path`` or ``tokenizer`` does not exist.
    """

    def __init__(
        self,
        path: str,
        vocabulary_size: int = 4096,
        sequence_length: int = 128,
        batch_size: int = 8,
        document_heading: str = "# ",
        validation_documents: int | None = 20,
        validation_fraction: float | None = None,
        tokenizer: str | None = None,
        cache_dir: str = ".cache/lightning_quartet",
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if validation_fraction is not None and not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction={validation_fraction} must lie between 0 and 1.")
        if validation_fraction is None and (validation_documents is None or validation_documents < 1):
            raise ValueError("TextDataModule needs validation_documents (1 or more) or validation_fraction.")
        for name, value, least in (
            ("vocabulary_size", vocabulary_size, 257),  # 256 bytes and the separator
            ("sequence_length", sequence_length, 1),
            ("batch_size", batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        self.path = Path(path)
        self.vocabulary_size = vocabulary_size
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.document_heading = document_heading
        self.validation_documents = validation_documents or 0
        self.validation_fraction = validation_fraction
        self.tokenizer_path = None if tokenizer is None else _tokenizer_file(tokenizer)
        self.cache_dir = Path(cache_dir)
        self.num_workers = num_workers
        self.tokenizer: Tokenizer | None = None
        self._sets: dict[str, PackedSequences] = {}

    @property
    def vocabulary_in_use(self) -> int | None:
        """Number of tokens of the tokenizer, None before ``setup``."""
        return None if self.tokenizer is None else self.tokenizer.get_vocab_size()

    def prepare_data(self) -> None:
        """Trains the tokenizer where the cache has none (one process a machine)."""
        if self.tokenizer_path is None and not self._cached_tokenizer().is_file():
            train, _ = self._split()
            _save(train_tokenizer(train, self.vocabulary_size), self._cached_tokenizer())

    def setup(self, stage: str) -> None:
        """Reads the text and packs it; a second call does nothing."""
        if self._sets:
            return
        file = self.tokenizer_path or self._cached_tokenizer()
        tokenizer = Tokenizer.from_file(str(file))
        separator = tokenizer.token_to_id(SEPARATOR)
        if separator is None:
            raise ValueError(f"The tokenizer {str(file)!r} has no token {SEPARATOR!r}, which starts each document.")
        for name, documents in zip(("train", "validation"), self._split(), strict=True):
            ids: list[int] = []
            for encoding in tokenizer.encode_batch(documents, add_special_tokens=False):
                ids += [separator, *encoding.ids]
            self._sets[name] = PackedSequences(torch.tensor(ids), self.sequence_length)
        least = {"train": self.batch_size, "validation": 1}  # incomplete training batches are dropped
        for name, sequences in self._sets.items():
            if len(sequences) < least[name]:
                raise ValueError(
                    f"{str(self.path)!r} gives {len(sequences)} {name} sequences of {self.sequence_length} tokens but "
                    f"at least {least[name]} are needed: take a longer text, a smaller batch_size or sequence_length."
                )
        self.tokenizer = tokenizer

    def train_dataloader(self) -> DataLoader[Tensor]:
        return self._loader("train", shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[Tensor]:
        return self._loader("validation")

    def predict_dataloader(self) -> DataLoader[Tensor]:
        return self._loader("validation")

    def _loader(self, name: str, shuffle: bool = False, drop_last: bool = False) -> DataLoader[Tensor]:
        return DataLoader(
            self._sets[name],
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _split(self) -> tuple[list[str], list[str]]:
        """Documents for training and for validation."""
        text = _read(self.path)
        if self.validation_fraction is not None:
            cut = len(text) - round(len(text) * self.validation_fraction)
            return _documents(text[:cut], self.document_heading), _documents(text[cut:], self.document_heading)
        documents = _documents(text, self.document_heading)
        count = self.validation_documents
        if len(documents) <= count:
            raise ValueError(
                f"{str(self.path)!r} has {len(documents)} documents (lines that begin with {self.document_heading!r} "
                f"start one), too few for validation_documents={count}: give a smaller number or validation_fraction."
            )
        return documents[:-count], documents[-count:]

    def _cached_tokenizer(self) -> Path:
        # Everything that the tokenizer depends on is in its name.
        _read_check(self.path)
        key = hashlib.sha256(self.path.read_bytes())
        key.update(repr((self.document_heading, self.validation_documents, self.validation_fraction)).encode())
        name = self.path.name.split(".")[0]
        return self.cache_dir / f"{name}-bpe{self.vocabulary_size}-{key.hexdigest()[:12]}.json"


def _read_check(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no text file {str(path)!r} (working folder {os.getcwd()!r}): "
            "run from the folder that the path is relative to, or give data.path as an absolute path."
        )


def _read(path: Path) -> str:
    _read_check(path)
    data = path.read_bytes()
    try:
        return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is no text in UTF-8, or no whole .xz file of it ({error}).") from error


def _documents(text: str, heading: str) -> list[str]:
    """The text in pieces that begin at lines starting with ``heading``; empty pieces are left out."""
    if not heading:
        return [text]
    marked = ("\n" + text).split("\n" + heading)
    pieces = [marked[0].removeprefix("\n"), *(heading + piece for piece in marked[1:])]
    return [piece for piece in pieces if piece.strip()]


def _tokenizer_file(tokenizer: str) -> Path:
    path = Path(tokenizer)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer={tokenizer!r} is neither a tokenizer.json nor a folder with one: give a local path."
        )
    return path


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of these texts, which decodes to them again."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _save(tokenizer: Tokenizer, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as path:
        tokenizer.save(str(path))
