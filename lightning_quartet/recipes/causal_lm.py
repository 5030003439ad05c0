"""A decoder language model from transformers, trained on packed sequences."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightning_quartet.moments import is_over, now, seconds
from lightning_quartet.recipes.optimizer import adamw

_STEPS_TO_AVERAGE = 20
_WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


class CausalLM(LightningModule):
    """Trains a causal language model of transformers with AdamW, linear warm-up and cosine decay.

    A batch is an int64 tensor ``[batch, sequence_length + 1]`` of token ids, as ``TextDataModule`` makes it; the model
    reads all but the last column and predicts all but the first. Logged: ``train_loss``, ``val_loss`` (mean negative
    log-likelihood per token, in nats), ``tokens_per_second`` (of training, this process) and ``learning_rate``.

    Args:
        config: Fields of the transformers configuration of a new, randomly initialised model; ``model_type`` (default
            ``llama``) chooses the architecture. Feature sizes that are multiples of 32 can be quantised.
        pretrained: A local Hugging Face folder to start from instead of ``config``. It is loaded in float32, so that
            the weights that the optimizer updates are.
        learning_rate: The peak, reached after ``warmup_steps``.
        final_learning_rate: The value at the last step, as a fraction of ``learning_rate``.
        weight_decay: Of matrices; vectors (norms, biases) are not decayed.
        betas: Of AdamW.
        warmup_steps: Optimizer steps of linear warm-up.
        lora: Fields of peft's ``LoraConfig``, such as ``r`` and ``target_modules``: adapters of this kind are trained
            and everything else is frozen. Needs the package ``peft``.
        compile_layers: Compile each decoder layer with ``torch.compile``; a string is its ``mode``:
            ``"reduce-overhead"`` replays CUDA graphs, which spares the host work in small layers, and cannot sum
            gradients over batches.

    Raises:
        ValueError: When not exactly one of ``config`` and ``pretrained`` is given, a field of ``config`` is unknown, or
            a model without ``layers`` is to be compiled; in a fit, for CUDA graphs with accumulated gradients.
        FileNotFoundError: When ``pretrained`` is not a folder with a ``config.json``.
    """

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        learning_rate: float = 1e-3,
        final_learning_rate: float = 0.1,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 0,
        lora: dict[str, Any] | None = None,
        compile_layers: bool | str = False,
    ) -> None:
        super().__init__()
        if (config is None) == (pretrained is None):
            raise ValueError("CausalLM needs either `config` (a new model) or `pretrained` (a local folder), not both.")
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.final_learning_rate = final_learning_rate
        self.weight_decay = weight_decay
        self.betas = (betas[0], betas[1])
        self.warmup_steps = warmup_steps
        self.model = _new_model(config) if config is not None else _load_model(str(pretrained))
        self._compile_mode = compile_layers if isinstance(compile_layers, str) else None
        if compile_layers:
            layers = getattr(self.model.get_decoder(), "layers", None)
            if layers is None:
                raise ValueError(
                    f"compile_layers={compile_layers!r}: a {self.model.config.model_type!r} model has no list "
                    "of decoder layers called `layers`; set compile_layers to false."
                )
            for layer in layers:
                layer.compile(mode=self._compile_mode)
        if lora is not None:
            self.model = _adapted(self.model, lora)
        self._recent: deque[tuple[Any, int]] = deque(maxlen=3 * _STEPS_TO_AVERAGE)  # ends of steps, and their tokens
        self._averaged = 0  # steps, at most, in a speed that was logged

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, length, vocabulary]`` of int64 token ids ``[batch, length]``."""
        # Else CUDA graphs would take every layer of an evaluation for the start of a step.
        if self._compile_mode is not None:
            torch.compiler.cudagraph_mark_step_begin()
        return self.model(input_ids=tokens, use_cache=False).logits

    def setup(self, stage: str) -> None:
        vocabulary = self.model.config.vocab_size
        size = getattr(getattr(self.trainer, "datamodule", None), "vocabulary_in_use", None)
        if size is not None and size > vocabulary:
            raise ValueError(
                f"The tokenizer has {size} tokens but the model's vocab_size is {vocabulary}: "
                "set the data's vocabulary_size and the model's config.vocab_size to the same number."
            )
        if stage == "fit":
            self._check_accumulation()

    def on_train_epoch_start(self) -> None:
        self._check_accumulation()  # GradientAccumulationScheduler sets it here

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), prog_bar=True, batch_size=batch.shape[0], sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self._loss(batch), batch_size=batch.shape[0], sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Negative log-likelihood of each predicted token, float32 ``[batch, sequence_length]``."""
        return self._loss(batch, reduction="none").view(batch.shape[0], -1)

    def on_train_start(self) -> None:
        self._recent.clear()
        self._averaged = 0

    def on_validation_end(self) -> None:
        self._recent.clear()  # the time that validation took is not training time

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        tokens = batch.shape[0] * (batch.shape[1] - 1)
        self._recent.append((now(self.device), tokens))
        # The host may be many steps ahead of the GPU: those that count are the last that it has done.
        done = [(moment, count) for moment, count in self._recent if is_over(moment)][-_STEPS_TO_AVERAGE - 1 :]
        steps = len(done) - 1
        if steps > 0 and 2 * steps >= self._averaged:  # few steps after a validation say less than the last before it
            self._averaged = max(steps, self._averaged)
            # As a tensor: a number would be copied to the device, and the host would wait.
            speed = torch.tensor(sum(count for _, count in done[1:]) / seconds(done[0][0], done[-1][0]))
            self.log("tokens_per_second", speed)
            self.log("tokens/s", speed, prog_bar=True, logger=False)  # short enough for a progress bar
        self.log("learning_rate", torch.tensor(self.trainer.optimizers[0].param_groups[0]["lr"]))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return adamw(
            self, self.learning_rate, self.final_learning_rate, self.weight_decay, self.betas, self.warmup_steps
        )

    def _loss(self, batch: Tensor, reduction: str = "mean") -> Tensor:
        logits = self(batch[:, :-1])
        return cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction=reduction)

    def _check_accumulation(self) -> None:
        batches = self.trainer.accumulate_grad_batches
        if batches > 1 and self._compile_mode in _WITH_CUDA_GRAPHS:
            # The next batch would write over the gradients, https://github.com/pytorch/pytorch/issues/169545.
            raise ValueError(
                f"compile_layers={self._compile_mode!r} replays CUDA graphs, which cannot sum gradients over "
                f"accumulate_grad_batches={batches}: set it to 1, or compile_layers to true."
            )


def _new_model(fields: dict[str, Any]) -> PreTrainedModel:
    fields = dict(fields)
    model_type = fields.pop("model_type", "llama")
    known = AutoConfig.for_model(model_type).to_dict()
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(
            f"The configuration of a {model_type!r} model has no field {', '.join(unknown)}; its fields are: "
            f"{', '.join(sorted(known))}."
        )
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))


def _adapted(model: PreTrainedModel, fields: dict[str, Any]) -> PreTrainedModel:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "CausalLM(lora=...) needs the package peft: pip install peft.", name="peft"
        ) from error
    return cast(PreTrainedModel, peft.get_peft_model(model, peft.LoraConfig(**{"task_type": "CAUSAL_LM", **fields})))


def _load_model(folder: str) -> PreTrainedModel:
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(
            f"pretrained={folder!r} is not a Hugging Face model folder (no config.json in it): "
            "give the path of a local folder; nothing is downloaded."
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.train()  # transformers gives it in evaluation mode, and Lightning keeps modes
