"""QuartetPrecision: MXFP4 matrix products as a precision plugin for the Trainer and for Fabric."""

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, get_args

import torch
from lightning.fabric.plugins.precision import HalfPrecision as FabricHalfPrecision
from lightning.fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
from lightning.fabric.plugins.precision import Precision as FabricPrecision
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_quartet.convert import (
    convert,
    converted_before,
    resolve_config,
    resolve_patterns,
    trained_as,
    warn_of_changes,
)
from lightning_quartet.linear import MICRO_BATCHES, QuartetLinear, set_quartet_step
from quartet_kernels import QuartetConfig

PrecisionName = Literal["bf16-mixed", "bf16-true", "32-true", "16-mixed"]


class QuartetPrecision(Precision):
    """Precision plugin that trains linear layers in MXFP4: ``Trainer(plugins=[QuartetPrecision("bf16-mixed")])``.

    On its own it converts the model before the optimizers are made, and counts optimizer steps and micro-batches for
    the random bits of the backward. With a `QuartetQAT` callback it only chooses the dtypes,
    and the callback does the rest. FSDPStrategy takes only Lightning's own plugins: use the callback there.

    It is a plugin for Fabric too: ``Fabric(plugins=QuartetPrecision("bf16-mixed"))``. Fabric does not save a plugin's
    state: put ``fabric.strategy.precision.state_dict()`` into the checkpoint and load it again, or the random bits of
    a resumed run begin anew.

    Args:
        precision: Dtypes outside of the MXFP4 products, as the Trainer's option of that name.
        config: The numerics, or the name of a recipe; ``None`` means the default (or the callback's).
        modules_to_not_convert: Names to leave alone, see `convert_to_quartet`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the precision or recipe is unknown; when it converts a model (of a Fabric, the first), if a
            pattern matches nothing or there is no layer to convert.
    """

    def __init__(
        self,
        precision: PrecisionName = "bf16-mixed",
        config: QuartetConfig | str | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
    ) -> None:
        if precision not in get_args(PrecisionName):
            allowed = ", ".join(map(repr, get_args(PrecisionName)))
            raise ValueError(f"QuartetPrecision: precision is {precision!r}; choose one of {allowed}.")
        self.precision = precision
        self.config = None if config is None else resolve_config(config)
        self.modules_to_not_convert = resolve_patterns(modules_to_not_convert)
        # Lightning's own plugins do dtypes and gradient scaling. Fabric's and the Trainer's differ in what they are
        # called with; convert_module finds out who calls.
        self._fabric_plugin: FabricPrecision = FabricPrecision()
        self._trainer_plugin: Precision = Precision()
        if precision == "bf16-true":
            self._fabric_plugin, self._trainer_plugin = FabricHalfPrecision(precision), HalfPrecision(precision)
        elif precision in ("bf16-mixed", "16-mixed"):
            device = "cuda" if torch.cuda.is_available() else "cpu"
            mixed = FabricMixedPrecision(precision, device)
            self._fabric_plugin, self._trainer_plugin = mixed, MixedPrecision(precision, device, mixed.scaler)
        self._plain: Any = self._fabric_plugin
        # All models that this plugin converted, under one root: two of them never share random bits.
        self._models = nn.ModuleList()
        self._step, self._micro_batch = 0, -1  # -1: no forward since the last optimizer step
        self._rank: int | None = None
        # In a Trainer: its loop over batches; the batch that is under way, and where the one before it ended.
        self._loop: Any = None
        self._counting = False  # is the step that of the checkpoint, if there is one
        self._batch: int | None = None
        self._before = (0, -1)
        self._inside = False  # a forward context
        self._trained: dict[str, Any] = {}  # for checkpoints: how the layers compute

    @property
    def scaler(self) -> "torch.amp.GradScaler | None":
        """The gradient scaler of ``16-mixed``."""
        return getattr(self._plain, "scaler", None)

    @property
    def _callback_converts(self) -> bool:
        """Whether a QuartetQAT callback does the conversion and the steps."""
        return hasattr(self, "_quartet_callback")

    # What this plugin adds -------------------------------------------------------------------------------------------

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert the model in place, then cast it as the plain precision does."""
        trainer = module._trainer if isinstance(module, LightningModule) else None
        in_trainer = trainer is not None and trainer.strategy.precision_plugin is self
        self._plain = self._trainer_plugin if in_trainer else self._fabric_plugin
        if not self._callback_converts:
            before = {layer for layer in module.modules() if isinstance(layer, QuartetLinear)}
            # A second model of one Fabric, a critic say, may have none.
            complete = in_trainer or len(self._models) == 0
            report = convert(module, self.config, self.modules_to_not_convert, complete=complete)
            if report.converted:
                rank_zero_info(str(report))
            elif not report.already_converted:
                rank_zero_warn(f"QuartetPrecision converts no layer of {type(module).__name__}. {report}")
            if not any(module is model for model in self._models):
                self._models.append(module)
            self._trained = trained_as(report.config, self.modules_to_not_convert, converted_before(module, before))
            if in_trainer:
                assert trainer is not None  # for the type checker
                self._step, self._micro_batch = trainer.global_step, -1  # another Trainer begins anew
                self._rank = data_parallel_rank(trainer.strategy)
                self._loop, self._counting, self._batch = trainer.fit_loop.epoch_loop, False, None
        return self._plain.convert_module(module)

    @override
    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Around a step or forward; each one that can have a backward is a new micro-batch."""
        if torch.is_grad_enabled():
            self._next_micro_batch()
        if len(self._models) > 0 and isinstance(self._plain, (MixedPrecision, FabricMixedPrecision)):
            self._plain.device = next(self._models.parameters()).device.type
        outer, self._inside = self._inside, True
        try:
            with self._plain.forward_context():
                yield
        finally:
            self._inside = outer

    def _next_micro_batch(self) -> None:
        if len(self._models) > 0:
            if self._loop is not None:
                if not self._counting:  # a checkpoint without this plugin's state, QuartetQAT's say, sets only the loop
                    self._step, self._counting = self._loop.global_step, True
                started = self._loop.batch_progress.total.started
                if started != self._batch:
                    self._batch = started
                    self._before = self._step, self._micro_batch
            self._micro_batch += 1
            set_quartet_step(self._models, self._step, self._micro_batch % MICRO_BATCHES, rank=self._rank)

    @override
    def optimizer_step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """The plain optimizer step; then the next step begins."""
        result = self._plain.optimizer_step(optimizer, *args, **kwargs)
        self._step, self._micro_batch = self._step + 1, -1
        if self._inside:  # manual optimization: there may be another forward in this batch
            self._next_micro_batch()
        return result

    @override
    def state_dict(self) -> dict[str, Any]:
        """The plain plugin's state (its scaler's), the step and the micro-batch, and how the layers compute."""
        step, micro_batch = self._step, self._micro_batch
        if self._loop is not None and self._before[0] == step:
            progress = self._loop.batch_progress
            if progress.total.started == self._batch and progress.current.started > progress.current.processed:
                # Saved in the middle of a batch (as QuartetQAT.state_dict may be), which a resumed run repeats.
                micro_batch = self._before[1]
        steps = {"step": step, "micro_batch": micro_batch}
        return {"plain": self._plain.state_dict(), **steps, **self._trained}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`; how the layers compute is this plugin's."""
        self._plain.load_state_dict(state_dict["plain"])
        if "config" in state_dict and self._trained:
            warn_of_changes(state_dict, self._trained, "QuartetPrecision")
        self._step, self._micro_batch, self._counting = state_dict["step"], state_dict["micro_batch"], True

    @override
    def teardown(self) -> None:
        """Let go of the models."""
        self._models, self._loop = nn.ModuleList(), None
        self._plain.teardown()

    # The rest is the plain plugin's ----------------------------------------------------------------------------------

    @override
    def tensor_init_context(self) -> AbstractContextManager:
        return self._plain.tensor_init_context()

    @override
    def module_init_context(self) -> AbstractContextManager:
        return self._plain.module_init_context()

    @override
    def convert_input(self, data: Any) -> Any:
        return self._plain.convert_input(data)

    @override
    def convert_output(self, data: Any) -> Any:
        return self._plain.convert_output(data)

    @override
    def pre_backward(self, *args: Any, **kwargs: Any) -> Any:
        return self._plain.pre_backward(*args, **kwargs)

    @override
    def backward(self, *args: Any, **kwargs: Any) -> None:
        self._plain.backward(*args, **kwargs)

    @override
    def post_backward(self, *args: Any, **kwargs: Any) -> Any:
        """After a backward; in manual optimization the next one in the same batch is another micro-batch."""
        if self._inside:
            self._next_micro_batch()
        return self._plain.post_backward(*args, **kwargs)

    @override
    def unscale_gradients(self, optimizer: Any) -> None:
        self._plain.unscale_gradients(optimizer)

    @override
    def clip_gradients(self, *args: Any, **kwargs: Any) -> None:
        self._plain.clip_gradients(*args, **kwargs)


def data_parallel_rank(strategy: object) -> int | None:
    """This process's number among those that get other data; ``None`` where every process does."""
    if isinstance(strategy, ModelParallelStrategy):
        return strategy.distributed_sampler_kwargs["rank"]
    return None
