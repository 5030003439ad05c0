"""Pretrained encoders from transformers, fine-tuned to tell classes apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from lightning_quartet.recipes.optimizer import adamw

Batch = dict[str, Tensor]


class _Classifier(LightningModule):
    """What `TextClassifier` and `ImageClassifier` have in common."""

    auto_class: ClassVar[Any]

    def __init__(
        self,
        pretrained: str,
        classes: int,
        learning_rate: float = 1e-4,
        final_learning_rate: float = 0.0,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.98),
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes={classes} must be at least 2.")
        if not (Path(pretrained) / "config.json").is_file():
            raise FileNotFoundError(
                f"pretrained={pretrained!r} is not a Hugging Face model folder (no config.json in it): give the path "
                "of a local folder; the example's fetch.py makes one."
            )
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.final_learning_rate = final_learning_rate
        self.weight_decay = weight_decay
        self.betas = (betas[0], betas[1])
        self.warmup_steps = warmup_steps
        self.model = self.auto_class.from_pretrained(
            pretrained, num_labels=classes, dtype=torch.float32, local_files_only=True
        ).train()
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, batch: Batch) -> Tensor:
        """Logits ``[batch, classes]``; ``labels`` in the batch are not read."""
        return self.model(**{name: value for name, value in batch.items() if name != "labels"}).logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch).float(), batch["labels"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probabilities, float32 ``[batch, classes]``."""
        return self(batch).float().softmax(-1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return adamw(
            self, self.learning_rate, self.final_learning_rate, self.weight_decay, self.betas, self.warmup_steps
        )

    def _evaluate(self, batch: Batch, stage: str, accuracy: MulticlassAccuracy) -> None:
        logits, labels = self(batch).float(), batch["labels"]
        accuracy.update(logits, labels)
        size = len(labels)
        self.log(f"{stage}_loss", cross_entropy(logits, labels), batch_size=size, sync_dist=True)
        self.log(f"{stage}_accuracy", accuracy, batch_size=size, prog_bar=True)


class TextClassifier(_Classifier):
    """Fine-tunes an encoder of transformers, such as BERT, on labelled texts.

    A batch is a dictionary of int64 tensors ``input_ids`` and ``attention_mask`` ``[batch, length]`` and ``labels``
    ``[batch]``, as ``LabelledTextDataModule`` makes it. Logged: ``train_loss``, ``val_loss``, ``val_accuracy``,
    ``test_loss``, ``test_accuracy``.

    Args:
        pretrained: A local Hugging Face folder; its model is loaded in float32 and gets a new last layer.
        classes: Number of classes.
        learning_rate: The peak, reached after ``warmup_steps``.
        final_learning_rate: The value at the last step, as a fraction of ``learning_rate``.
        weight_decay: Of matrices.
        betas: Of AdamW.
        warmup_steps: Optimizer steps of linear warm-up.

    Raises:
        ValueError: When there are less than two classes.
        FileNotFoundError: When ``pretrained`` is not a folder with a ``config.json``.
    """

    auto_class = AutoModelForSequenceClassification


class ImageClassifier(_Classifier):
    """Fine-tunes a vision transformer of transformers, such as DINOv2, on labelled images.

    A batch is a dictionary of ``pixel_values``, float ``[batch, 3, height, width]``, and int64 ``labels`` ``[batch]``,
    as ``FashionMNISTDataModule`` makes it. What is logged, arguments and errors are those of `TextClassifier`.
    """

    auto_class = AutoModelForImageClassification
