"""QuartetQAT: the callback that turns a training into one with MXFP4 matrix products."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_quartet.convert import (
    convert,
    converted_before,
    resolve_config,
    resolve_patterns,
    revert,
    trained_as,
    warn_of_changes,
)
from lightning_quartet.linear import MICRO_BATCHES, QuartetLinear, set_quartet_step, unset_quartet_step
from lightning_quartet.packed import PackedQuartetLinear
from lightning_quartet.precision import QuartetPrecision, data_parallel_rank
from quartet_kernels import QuartetConfig
from quartet_kernels.backends import select_backend
from quartet_kernels.linear import weight_window

_STATE_VERSION = 1


class QuartetQAT(Callback):
    """Trains the linear layers of any LightningModule in MXFP4: ``Trainer(callbacks=[QuartetQAT()])``.

    The layers become `QuartetLinear` when a fit, validation, test or prediction begins, also
    those that ``setup`` or ``configure_model`` make; the model's state dict stays that of ``nn.Linear``. The random
    bits of the backward follow from the config's seed, the step and the batch, so the user's random streams are not
    touched and a resumed run repeats an uninterrupted one bit for bit.

    Args:
        config: The numerics: a config, the name of a recipe such as ``"quartet_stochastic"``, or ``None`` for the
            default.
        modules_to_not_convert: Names to leave alone, see `convert_to_quartet`; ``None`` means
            ``lm_head`` where there is one, and layers tied to an embedding.
        start_step: The optimizer step from which on products are MXFP4; before it the layers compute as ``nn.Linear``.
        end_step: The optimizer step from which on they compute as ``nn.Linear`` again; ``None`` means never.
        master_dtype: ``"float32"`` keeps the converted layers' parameters in float32 where the Trainer's precision
            (``bf16-true``, ``16-true``) would cast them.
        revert_on_end: Give the layers that this callback converted their class ``nn.Linear`` back at the end, also
            after an exception.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a recipe or step is not valid; when a run begins, if a pattern matches nothing or there is no
            layer to convert.
        RuntimeError: When a run begins, if the config's backend cannot run on its device.
        MisconfigurationException: When a run begins, for a Trainer, strategy, plugin, callback or optimizer that it
            cannot work with.

    Example:
        ```python
        trainer = Trainer(max_steps=1000, precision="bf16-mixed", callbacks=[QuartetQAT("quartet")])
        trainer.fit(model, data)
        ```
    """

    def __init__(
        self,
        config: QuartetConfig | str | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        start_step: int = 0,
        end_step: int | None = None,
        master_dtype: Literal["float32"] | None = None,
        revert_on_end: bool = False,
    ) -> None:
        self.config = resolve_config(config)
        self.modules_to_not_convert = resolve_patterns(modules_to_not_convert)
        if not isinstance(start_step, int) or start_step < 0:
            raise ValueError(f"QuartetQAT: start_step is {start_step!r}; it must be an integer of at least 0.")
        if end_step is not None and (not isinstance(end_step, int) or end_step <= start_step):
            raise ValueError(
                f"QuartetQAT: end_step is {end_step!r}; it must be None or an integer greater than start_step "
                f"({start_step})."
            )
        if master_dtype not in (None, "float32"):
            raise ValueError(f"QuartetQAT: master_dtype is {master_dtype!r}; it must be 'float32' or None.")
        self.start_step = start_step
        self.end_step = end_step
        self.master_dtype = master_dtype
        self.revert_on_end = revert_on_end
        self._step: int | None = None  # of this batch
        self._micro_batch = 0
        self._before: tuple[int | None, int] = (None, 0)  # the same of the batch before
        self._progress: Any = None  # Lightning's counts of batches started and processed
        self._known_step: int | None = None  # that the weights of the last fit or checkpoint were trained for
        self._rank: int | None = None
        self._converted: list[nn.Module] = []
        self._plain_dtypes: dict[nn.Parameter, torch.dtype] = {}  # that the precision plugin gives masters
        self._converted_before: list[dict[str, Any]] = []  # for checkpoints: layers that others converted
        self._undo: list[Callable[[], None]] = []

    # Set-up and its undoing ------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        _check_trainer(trainer)
        self._check_neighbours(trainer)
        self._rank = data_parallel_rank(trainer.strategy)
        select_backend(self.config.backend, trainer.strategy.root_device, torch.float32)

        # Layers that the module's own hooks make are still to come; convert_module, the last call before optimizers
        # are made, checks then.
        late = is_overridden("setup", pl_module) or is_overridden("configure_model", pl_module)
        self._convert(pl_module, complete=not late)
        if is_overridden("configure_model", pl_module):
            self._wrap_configure_model(pl_module)
        self._route(trainer, pl_module)
        if stage == "fit":
            # A checkpoint that is resumed sets them again after this.
            self._step, self._micro_batch, self._known_step = None, 0, None

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore(pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Lightning does not call teardown after an exception.
        if trainer.state.fn == TrainerFn.FITTING:
            self._known_step = trainer.global_step
        try:
            self._restore(pl_module)
        except ValueError as error:  # what ended the run is what its user has to see
            rank_zero_warn(f"QuartetQAT(revert_on_end=True) could not revert the layers: {error}")

    def _restore(self, pl_module: pl.LightningModule) -> None:
        weight_window.close()
        while self._undo:
            self._undo.pop()()
        # A callback that is kept must not keep models.
        converted, self._converted = self._converted, []
        dtypes, self._plain_dtypes = self._plain_dtypes, {}
        unset_quartet_step(pl_module)
        if self.revert_on_end:
            revert(pl_module, converted)
            for parameter, dtype in dtypes.items():
                parameter.data = parameter.data.to(dtype)

    def _check_neighbours(self, trainer: pl.Trainer) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy):
            raise MisconfigurationException(
                "QuartetQAT does not work with DeepSpeed, which replaces parameters and the backward; choose another "
                "strategy, for example 'ddp'."
            )
        sharded = isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))
        if sharded and self.master_dtype is not None:
            raise MisconfigurationException(
                f"QuartetQAT(master_dtype={self.master_dtype!r}) does not work with {type(strategy).__name__}, which "
                "needs one dtype for all parameters; keep the model in float32 with precision='bf16-mixed' instead."
            )
        averaging = _averaging(trainer)
        if isinstance(strategy, ModelParallelStrategy) and averaging is not None:
            raise MisconfigurationException(
                f"{type(averaging).__name__} does not work with {type(strategy).__name__}, whose sharded modules "
                "cannot be copied; leave one of them out."
            )
        plugin = strategy.precision_plugin
        if isinstance(plugin, _Routing):
            raise MisconfigurationException("The Trainer has two QuartetQAT callbacks; keep one.")
        if isinstance(plugin, QuartetPrecision):
            if plugin.config is not None and plugin.config != self.config:
                raise MisconfigurationException(
                    f"QuartetPrecision has {plugin.config} and QuartetQAT {self.config}; give the config to only one "
                    "of them."
                )
            if plugin.modules_to_not_convert not in (None, self.modules_to_not_convert):
                raise MisconfigurationException(
                    f"QuartetPrecision has modules_to_not_convert={plugin.modules_to_not_convert} and QuartetQAT "
                    f"{self.modules_to_not_convert}; give them to only one of the two."
                )

    def _wrap_configure_model(self, pl_module: pl.LightningModule) -> None:
        """Convert right after ``configure_model``, so that what follows it (checkpoints, weight averaging) sees it."""
        original = pl_module.configure_model
        instance_attribute = pl_module.__dict__.get("configure_model")

        def undo() -> None:
            if instance_attribute is None:
                pl_module.__dict__.pop("configure_model", None)
            else:
                pl_module.__dict__["configure_model"] = instance_attribute

        @functools.wraps(original)
        def configure_model() -> None:
            undo()  # a copy of the module (weight averaging makes one) must not call this one's
            original()
            self._convert(pl_module, complete=False)

        pl_module.__dict__["configure_model"] = configure_model
        self._undo.append(undo)

    def _route(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the Trainer's own precision plugin call us in ``convert_module``.

        A subclass made on the fly keeps everything else: what strategies accept, and the name under which a gradient
        scaler is found in checkpoints.
        """
        plugin = trainer.strategy.precision_plugin
        plain = type(plugin)
        routed = type(f"Quartet{plain.__name__}", (_Routing, plain), {"__qualname__": plain.__qualname__})
        plugin.__class__ = routed
        plugin._quartet_callback = self  # type: ignore[attr-defined]
        trainer.strategy.precision_plugin = plugin

        def undo() -> None:
            plugin.__class__ = plain
            del plugin._quartet_callback  # type: ignore[attr-defined]

        self._undo.append(undo)

    # Conversion ------------------------------------------------------------------------------------------------------

    def _convert(self, module: nn.Module, complete: bool) -> None:
        before = {layer for layer in module.modules() if isinstance(layer, QuartetLinear)}
        try:
            report = convert(module, self.config, self.modules_to_not_convert, complete=complete)
        except (TypeError, ValueError):
            revert(module, self._converted)  # found late: layers that were there in setup are converted already
            raise
        self._converted += [
            layer for layer in module.modules() if isinstance(layer, QuartetLinear) and layer not in before
        ]
        self._converted_before = converted_before(module, before.difference(self._converted))
        if report.unchanged and complete:
            name, how = next(iter(report.unchanged.items()))
            others = f" and {len(report.unchanged) - 1} more" if len(report.unchanged) > 1 else ""
            rank_zero_warn(
                f"Layers converted before stay as they are, {name} ({how}){others}: call revert_from_quartet(model) "
                "first to train them as QuartetQAT says."
            )
        if self.master_dtype is not None:
            for parameter in _own_parameters(module):
                parameter.data = parameter.data.float()
        if report.converted:
            rank_zero_info(str(report))

    def _convert_module(self, plain: Callable[[nn.Module], nn.Module], module: nn.Module) -> nn.Module:
        """The precision plugin's ``convert_module``, around the plugin's own."""
        self._convert(module, complete=True)
        masters: dict[nn.Parameter, Tensor] = {}
        if self.master_dtype is not None:
            masters = {parameter: parameter.data for parameter in _own_parameters(module)}
        module = plain(module)
        self._plain_dtypes = {parameter: parameter.dtype for parameter in masters}
        for parameter, data in masters.items():
            parameter.data = data.to(parameter.device)
        return module

    # Steps -----------------------------------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        averaging = _averaging(trainer)
        if averaging is not None and any(isinstance(module, PackedQuartetLinear) for module in pl_module.modules()):
            raise MisconfigurationException(
                f"{type(averaging).__name__} does not work with packed weights, whose 4-bit codes it would average as "
                "numbers; keep the master weights (store_master_weights=True) or leave it out."
            )
        parameters = set(pl_module.parameters())
        optimizers = [optimizer for optimizer in trainer.optimizers if not isinstance(optimizer, _MockOptimizer)]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        trained = [parameter for group in groups for parameter in group["params"]]
        # Plain tensors are no model's: latent variables of one that is frozen, say.
        if optimizers and all(isinstance(p, nn.Parameter) and p not in parameters for p in trained):
            raise MisconfigurationException(
                f"None of the parameters of {', '.join(type(optimizer).__name__ for optimizer in optimizers)} belongs "
                "to the model, so it would train nothing; make the optimizer in configure_optimizers."
            )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self._before = self._step, self._micro_batch
        self._step, self._micro_batch = step, self._micro_batch + 1 if step == self._step else 0
        if self._has_phases:  # else on_train_start has said it for the whole fit
            self._enable(pl_module, step)
        self._set_step(pl_module)
        sharded = isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy))  # weights come and go there
        if trainer.accumulate_grad_batches > 1 and not sharded:
            weight_window.open(step)

    def _set_step(self, pl_module: pl.LightningModule) -> None:
        assert self._step is not None
        set_quartet_step(pl_module, self._step, self._micro_batch % MICRO_BATCHES, rank=self._rank)

    # In manual optimization one batch can have several backwards and several steps.

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not pl_module.automatic_optimization and self._step is not None:
            self._micro_batch += 1
            self._set_step(pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        weight_window.close()
        if not pl_module.automatic_optimization and self._step is not None:
            self._step, self._micro_batch = trainer.global_step + 1, 0
            self._enable(pl_module, self._step)
            self._set_step(pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._progress = trainer.fit_loop.epoch_loop.batch_progress.current
        self._enable(pl_module, trainer.global_step)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._known_step = trainer.global_step

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weight_window.close()  # averaged weights may be swapped in without a trace
        self._enable_for_evaluation(trainer, pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._enable_for_evaluation(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._enable_for_evaluation(trainer, pl_module)

    def _enable_for_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Switch the layers to the phase of the current step (outside fit: of the last step that is known)."""
        step = trainer.global_step
        if trainer.state.fn != TrainerFn.FITTING:
            if self._known_step is not None:
                step = self._known_step
            elif self._has_phases and step == 0:
                rank_zero_warn(
                    f"QuartetQAT(start_step={self.start_step}, end_step={self.end_step}) does not know how many steps "
                    "these weights were trained and takes 0; give a whole checkpoint (not save_weights_only) as "
                    "ckpt_path, or leave the steps out."
                )
        self._enable(pl_module, step)

    @property
    def _has_phases(self) -> bool:
        return self.start_step > 0 or self.end_step is not None

    def _enable(self, pl_module: pl.LightningModule, step: int) -> None:
        """Switch the layers to the phase of a step."""
        enabled = self.start_step <= step and (self.end_step is None or step < self.end_step)
        for module in pl_module.modules():
            if isinstance(module, QuartetLinear) and module.quartet_enabled != enabled:
                module.quartet_enabled = enabled

    # Checkpoints -----------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        step, micro_batch = self._step, self._micro_batch
        if self._progress is not None and self._progress.started > self._progress.processed:
            # Saved in the middle of a batch (after an exception, or by SLURM's signal), which a resumed run repeats.
            step, micro_batch = self._before
        # Primitives only: the Trainer loads checkpoints with weights_only=True.
        return {
            "version": _STATE_VERSION,
            **trained_as(self.config, self.modules_to_not_convert, self._converted_before),
            "start_step": self.start_step,
            "end_step": self.end_step,
            "step": step,
            "micro_batch": micro_batch,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step, self._micro_batch = state_dict["step"], state_dict["micro_batch"]
        warn_of_changes(state_dict, self.state_dict(), "QuartetQAT")

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._known_step = checkpoint["global_step"]
        plugin = checkpoint.get("QuartetPrecision", {})
        if "config" in plugin and self.state_key not in checkpoint.get("callbacks", {}):
            warn_of_changes(plugin, self.state_dict(), "QuartetQAT")


class _Routing(Precision):
    """Mixed into the class of the Trainer's precision plugin, see ``QuartetQAT._route``."""

    _quartet_callback: QuartetQAT

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        return self._quartet_callback._convert_module(super().convert_module, module)


def _check_trainer(trainer: object) -> None:
    if not isinstance(trainer, pl.Trainer):
        raise MisconfigurationException(
            f"QuartetQAT needs a Trainer of the package `lightning`, not {type(trainer).__module__}."
            f"{type(trainer).__qualname__}: write `import lightning.pytorch as pl` instead of "
            "`import pytorch_lightning as pl`."
        )


def _averaging(trainer: pl.Trainer) -> Callback | None:
    """The Trainer's callback that averages weights, if it has one."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, (WeightAveraging, StochasticWeightAveraging))), None)


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that only QuartetLinear layers use; a tied embedding must keep the model's dtype."""
    layers, others = [], set()
    for child in module.modules():
        if isinstance(child, QuartetLinear):
            layers += list(child.parameters(recurse=False))
        else:
            others |= set(child.parameters(recurse=False))
    return [p for p in dict.fromkeys(layers) if p not in others and p.is_floating_point()]
