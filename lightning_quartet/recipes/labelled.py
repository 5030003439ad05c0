"""Labelled texts and images."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import struct
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_quartet.recipes.text import _tokenizer_file

Batch = dict[str, Tensor]


class _Rows(Dataset[Batch]):
    """Rows of equally long tensors, as dictionaries."""

    def __init__(self, tensors: Batch) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors["labels"])

    def __getitem__(self, index: int) -> Batch:
        return {name: tensor[index] for name, tensor in self.tensors.items()}


class LabelledTextDataModule(LightningDataModule):
    """Texts with a class each, shuffled once and cut into training, validation and test data.

    Args:
        path: A file of lines ``{"text": ..., "label": ...}``, JSON, labels from 0; also compressed, ``.xz``.
        tokenizer: A ``tokenizer.json`` or a folder with one, as a Hugging Face model has it.
        length: Tokens of a text; longer ones are cut, shorter ones padded.
        batch_size: Texts in a batch.
        held_out: Fraction of the texts for validation, and the same again for the test.
        seed: Of the cut into three.
        num_workers: Processes that load data.

    Raises:
        ValueError: For a number out of range, or a line that is not of that form.
        FileNotFoundError: When ``path`` or ``tokenizer`` does not exist.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str,
        length: int = 128,
        batch_size: int = 32,
        held_out: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < held_out < 0.5:
            raise ValueError(f"held_out={held_out} must lie between 0 and 0.5.")
        for name, value in (("length", length), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        self.path = Path(path)
        self.tokenizer_path = _tokenizer_file(tokenizer)
        self.length = length
        self.batch_size = batch_size
        self.held_out = held_out
        self.seed = seed
        self.num_workers = num_workers
        self._sets: dict[str, _Rows] = {}

    def setup(self, stage: str) -> None:
        """Reads, encodes and cuts; a second call does nothing."""
        if self._sets:
            return
        texts, labels = _read_lines(self.path)
        tokenizer = Tokenizer.from_file(str(self.tokenizer_path))
        tokenizer.enable_truncation(self.length)
        padding = tokenizer.padding or {}
        pad = {name: padding[name] for name in ("pad_id", "pad_token") if name in padding}
        tokenizer.enable_padding(length=self.length, **pad)
        encoded = tokenizer.encode_batch(texts)
        rows = {
            "input_ids": torch.tensor([e.ids for e in encoded]),
            "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
            "labels": torch.tensor(labels),
        }
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(self.seed))
        count = math.ceil(len(texts) * self.held_out)
        if len(texts) - 2 * count < self.batch_size:
            raise ValueError(
                f"{str(self.path)!r} has {len(texts)} texts, too few for batch_size={self.batch_size} and "
                f"held_out={self.held_out}."
            )
        parts = {"test": order[:count], "validation": order[count : 2 * count], "train": order[2 * count :]}
        self._sets = {
            part: _Rows({name: tensor[index] for name, tensor in rows.items()}) for part, index in parts.items()
        }

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader("train", train=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self._loader("test")

    def _loader(self, part: str, train: bool = False) -> DataLoader[Batch]:
        return DataLoader(
            self._sets[part], self.batch_size, shuffle=train, drop_last=train, num_workers=self.num_workers
        )


class FashionMNISTDataModule(LightningDataModule):
    """Fashion-MNIST, 28 x 28 grey images of ten kinds of clothes, as colour images of the size a model wants.

    Images travel to the device as bytes and are enlarged and normalised there.

    Args:
        path: Folder with the four files ``{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz``.
        image_size: Height and width that a model gets.
        batch_size: Images in a batch.
        validation_images: The last so many of the training images are for validation.
        train_images: So many of the others, the first ones, are trained on; ``None`` means all.
        num_workers: Processes that load data.

    Raises:
        ValueError: For a number out of range, or a file that is not of that format.
        FileNotFoundError: When one of the files does not exist.
    """

    # Of ImageNet, what vision transformers are pretrained with.
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(
        self,
        path: str,
        image_size: int = 112,
        batch_size: int = 64,
        validation_images: int = 5000,
        train_images: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("image_size", image_size),
            ("batch_size", batch_size),
            ("validation_images", validation_images),
            ("train_images", 1 if train_images is None else train_images),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        self.path = Path(path)
        self.image_size = image_size
        self.batch_size = batch_size
        self.validation_images = validation_images
        self.train_images = train_images
        self.num_workers = num_workers
        self._sets: dict[str, TensorDataset] = {}

    def setup(self, stage: str) -> None:
        """Reads the files; a second call does nothing."""
        if self._sets:
            return
        images, labels = self._read("train")
        cut = len(images) - self.validation_images
        used = cut if self.train_images is None else min(cut, self.train_images)
        if used < self.batch_size:
            raise ValueError(
                f"{str(self.path)!r} has {len(images)} training images, too few for validation_images="
                f"{self.validation_images}, train_images={self.train_images} and batch_size={self.batch_size}."
            )
        self._sets = {
            "train": TensorDataset(images[:used], labels[:used]),
            "validation": TensorDataset(images[cut:], labels[cut:]),
            "test": TensorDataset(*self._read("t10k")),
        }

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> Batch:
        """uint8 ``[batch, 28, 28]`` to float32 ``[batch, 3, image_size, image_size]``, normalised."""
        images, labels = batch
        large = interpolate(images[:, None].float() / 255, size=(self.image_size,) * 2, mode="bilinear")
        mean, std = (large.new_tensor(values).view(3, 1, 1) for values in (self.MEAN, self.STD))
        return {"pixel_values": (large - mean) / std, "labels": labels}

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader("train", train=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader("test")

    def _loader(self, part: str, train: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(
            self._sets[part], self.batch_size, shuffle=train, drop_last=train, num_workers=self.num_workers
        )

    def _read(self, part: str) -> tuple[Tensor, Tensor]:
        images = _read_idx(self.path / f"{part}-images-idx3-ubyte.gz", 3)
        labels = _read_idx(self.path / f"{part}-labels-idx1-ubyte.gz", 1)
        if len(images) != len(labels):
            raise ValueError(f"{str(self.path)!r} has {len(images)} {part} images and {len(labels)} labels.")
        return images, labels.long()


def _read_lines(path: Path) -> tuple[list[str], list[int]]:
    data = _checked(path).read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    texts, labels = [], []
    for number, line in enumerate(text.rstrip().split("\n"), start=1):
        try:
            row = json.loads(line)
            texts.append(row["text"] + "")
            labels.append(row["label"] + 0)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"Line {number} of {str(path)!r} is not {{'text': a string, 'label': a number}}."
            ) from error
    return texts, labels


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """The uint8 tensor in an IDX file."""
    data = gzip.decompress(_checked(path).read_bytes())
    header = 4 + 4 * dimensions
    if data[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"{str(path)!r} is not an IDX file of bytes with {dimensions} dimensions.")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    if len(data) != header + math.prod(shape):
        raise ValueError(f"{str(path)!r} is cut short: it should hold {shape} bytes.")
    return torch.frombuffer(bytearray(data[header:]), dtype=torch.uint8).view(shape)


def _checked(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}: the example's fetch.py makes it, or give data.path.")
    return path
