"""What a recipe leaves behind at its end: a picture of the losses and a piece of generated text."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from matplotlib.figure import Figure
from tokenizers import Tokenizer

from lightning_quartet.recipes.text import SEPARATOR, TextDataModule
from lightning_quartet.strategies import QuartetFSDP


class LossCurve(Callback):
    """Writes ``loss_curve.png``, training and validation loss over optimizer steps, into the run's folder.

    Args:
        train: Name of the logged training loss.
        validation: Name of the logged validation loss.
        filename: Of the picture, in the logger's folder (without a logger: the Trainer's ``default_root_dir``).
    """

    def __init__(
        self, train: str = "train_loss", validation: str = "val_loss", filename: str = "loss_curve.png"
    ) -> None:
        self.filename = filename
        self.losses: dict[str, list[tuple[int, float]]] = {train: [], validation: []}
        self._train, self._validation = train, validation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.global_step == 0:  # another run; a checkpoint is restored after this
            self.losses = {name: [] for name in self.losses}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        points = self.losses[self._train]
        noted = points[-1][0] if points else 0
        if trainer.global_step % every == 0 and trainer.global_step > noted:  # reading a loss waits for the device
            self._note(trainer, self._train)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._note(trainer, self._validation)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        file = _run_folder(trainer) / self.filename
        if not trainer.is_global_zero:
            return
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for name, points in self.losses.items():
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker="o" if name == self._validation else None)
        axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
        axes.grid(alpha=0.3)
        if any(self.losses.values()):
            axes.legend()
        figure.savefig(file, dpi=120)
        rank_zero_info(f"Loss curve: {file}")

    def state_dict(self) -> dict[str, Any]:
        return {name: list(points) for name, points in self.losses.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses.update({name: list(points) for name, points in state_dict.items()})

    def _note(self, trainer: Trainer, name: str) -> None:
        if name in trainer.callback_metrics:
            self.losses[name].append((trainer.global_step, trainer.callback_metrics[name].item()))


class TextSample(Callback):
    """Generates text at the end of training: on the console, in TensorBoard and as ``sample.txt`` in the run's folder.

    The model needs an attribute ``model`` with transformers' ``generate`` (``CausalLM`` has it) and the data a
    ``tokenizer`` (``TextDataModule`` has it).

    Args:
        prompt: Text to go on from.
        max_new_tokens: Tokens to generate.
        temperature: Of the sampling.
        top_k: Sampling among so many most likely tokens.
    """

    def __init__(
        self, prompt: str = "My fellow Americans,", max_new_tokens: int = 100, temperature: float = 0.8, top_k: int = 50
    ) -> None:
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        text = self.generate(trainer, pl_module)  # on all ranks: parameters may be sharded over them
        folder = _run_folder(trainer)
        if not trainer.is_global_zero:
            return
        (folder / "sample.txt").write_text(text + "\n", encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("sample", text, trainer.global_step)
        rank_zero_info(f"Sample of generated text:\n{text}")

    def generate(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """The prompt and its continuation."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, TextDataModule) or data.tokenizer is None:
            raise TypeError(
                f"TextSample needs a TextDataModule, which has a tokenizer; the Trainer's data is {data!r}."
            )
        tokenizer: Tokenizer = data.tokenizer
        separator = tokenizer.token_to_id(SEPARATOR)
        ids = [separator, *tokenizer.encode(self.prompt, add_special_tokens=False).ids]
        training = pl_module.training
        pl_module.eval()
        # Compiled layers would be compiled anew for every length.
        eager = torch.compiler.set_stance("force_eager")
        generate: Any = pl_module.model.generate  # type: ignore[union-attr]
        if isinstance(trainer.strategy, QuartetFSDP):
            generate = partial(trainer.strategy.call, generate)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), eager:
            out = generate(
                input_ids=torch.tensor([ids], device=pl_module.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=pl_module.device),
                max_new_tokens=self.max_new_tokens,
                do_sample=True,
                temperature=self.temperature,
                top_k=self.top_k,
                eos_token_id=separator,
                pad_token_id=separator,
            )
        pl_module.train(training)
        return tokenizer.decode(out[0].tolist(), skip_special_tokens=True)


def _run_folder(trainer: Trainer) -> Path:
    """The folder of this run; all ranks must ask, because ``log_dir`` is sent from rank zero to the others."""
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
