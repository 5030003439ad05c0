"""QuartetFSDP: fully sharded training (FSDP2) that sends weights as 4-bit codes."""

import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from typing_extensions import override

from lightning_quartet.callbacks import QuartetQAT
from lightning_quartet.gathered import ShardedWeight
from lightning_quartet.linear import QuartetLinear, _is_dtensor
from lightning_quartet.packed import PackedQuartetLinear

_ENTRIES = ("forward", "training_step", "validation_step", "test_step", "predict_step")


class _Root(nn.Module):
    """What FSDP2 takes for the model: gathers what is in no block, and keeps it until the backward is over.

    Lightning calls ``training_step``, which calls ``forward``. If the LightningModule were the root, FSDP2 would take
    the end of ``forward`` for that of the step, free the root's parameters and gather them again for the backward.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.module = module
        self.blocks = blocks
        self.weights: list[nn.Parameter] = []  # that are gathered packed: DTensors
        self.running = False
        self.again = False  # was anything freed in the middle of this step
        self.stale = False  # and not gathered since
        self.interrupted = False  # by an exception in a forward or backward, since FSDP2 was told of one

    def forward(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.running = True
        try:
            return method(*args, **kwargs)
        finally:
            self.running = False

    def route(self, name: str) -> None:
        """Let calls of a method of the module come through here."""
        method = getattr(self.module, name)

        @functools.wraps(method)
        def routed(*args: Any, **kwargs: Any) -> Any:
            return self.run(method, *args, **kwargs)

        self.module.__dict__[name] = routed

    def follow(self, name: str) -> None:
        """After calls of a method that freezes or unfreezes parameters, let gathered ones be like their shards."""
        method = getattr(self.module, name)

        @functools.wraps(method)
        def followed(*args: Any, **kwargs: Any) -> Any:
            method(*args, **kwargs)
            if self.running:
                self.outdate()

        self.module.__dict__[name] = followed

    def run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call what computes with the module."""
        if torch.is_inference_mode_enabled():  # what it makes could not be written again
            with torch.inference_mode(False), torch.no_grad():
                return self.run(method, *args, **kwargs)
        if self.running:
            self.gather()
            return method(*args, **kwargs)
        trainer = self.module.__dict__.get("_trainer")
        if trainer is not None and trainer.training and getattr(trainer.strategy, "_root", None) is not self:
            raise MisconfigurationException(
                f"{type(self.module).__name__} was sharded by another QuartetFSDP than this "
                f"{type(trainer.strategy).__name__}; make the model anew, with a checkpoint as ckpt_path."
            )
        # All at once, and not on FSDP2's stream: there, beside the kernels of a layer that leave no room, each of a
        # block's weights would wait for its turn, and the block for the last.
        shards = _shards_of(self.weights)
        for weight, shard in zip(self.weights, shards, strict=True):
            shard.pack(weight.device_mesh.size())  # type: ignore[attr-defined]
            shard.is_packed = True
        try:
            return self(method, *args, **kwargs)
        except BaseException:
            self.interrupted = True
            raise
        finally:
            for shard in shards:
                shard.is_packed = False
            if self.again:
                self.free()  # no backward may come that would

    def outdate(self) -> None:
        """After a backward inside a step, or after weights changed: what computes next gathers anew."""
        inside = self.running
        self.free()
        self.again = self.stale = inside
        if inside and any(True for _ in self.module.parameters(recurse=False)):
            self.gather()  # its own parameters are read without a call that could do it

    def gather(self, *args: Any) -> None:
        """Before anything outside of blocks computes; a forward pre-hook of its modules."""
        if self.stale:
            self.stale = False
            self.unshard()  # type: ignore[operator]

    def free(self) -> None:
        """Keep no gathered weights, here and in blocks."""
        self.again = self.stale = False
        self.set_reshard_after_forward(True, recurse=False)  # type: ignore[operator]
        for module in (self, *self.blocks):
            module.reshard()  # type: ignore[operator]
        self.set_reshard_after_forward(False, recurse=False)  # type: ignore[operator]


class QuartetFSDP(ModelParallelStrategy):
    """FSDP2 for Quartet models: ``Trainer(strategy="quartet_fsdp", callbacks=[QuartetQAT()])``.

    Parameters, gradients and optimizer states are sharded over all GPUs. Before the model runs, each GPU quantises its
    own rows of all QuartetLinear weights, and before a block runs it sends the block's as MXFP4 codes, 0.53 bytes an
    element; other parameters are sent as FSDP2 always does, in bfloat16 under ``bf16-mixed``. The master weights stay
    what they are: float32, or bfloat16 under ``bf16-true``. The model needs no ``configure_model``; one that has it may
    build layers there, also on the ``meta`` device, and must not shard them.

    Args:
        block_classes: Names of the classes whose modules are gathered and freed as one; ``None`` means the members of
            the outermost ``nn.ModuleList``, or ``nn.Sequential`` of one class, that have layers inside. What is in no
            block is gathered once a step.
        packed: Send QuartetLinear weights as 4-bit codes; ``False`` sends them like all others.
        reshard_after_forward: Free a block's weights after its forward and gather them again for the backward;
            ``False`` keeps them.
        reduce_dtype: The precision in which gradients are summed over the GPUs.
        reduce_every_batch: While gradients accumulate over several batches, sum them over the GPUs after each one.
            ``False`` sums once before the optimizer step: less traffic, but every GPU holds a whole gradient till then.
        save_distributed_checkpoint: Save a folder with a file for each rank; ``False`` saves one file.
        process_group_backend: Of ``torch.distributed``; ``None`` chooses by device.
        timeout: Of collective operations.

    Raises:
        ValueError: If ``reduce_dtype`` is unknown.
        MisconfigurationException: In ``setup``, for a model or callback that it cannot work with.
    """

    def __init__(
        self,
        block_classes: Sequence[str] | None = None,
        packed: bool = True,
        reshard_after_forward: bool = True,
        reduce_dtype: Literal["float32", "bfloat16"] = "float32",
        reduce_every_batch: bool = False,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend, timeout)
        if reduce_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"QuartetFSDP: reduce_dtype is {reduce_dtype!r}; choose 'float32' or 'bfloat16'.")
        self.block_classes = None if block_classes is None else tuple(block_classes)
        self.packed = packed
        self.reshard_after_forward = reshard_after_forward
        self.reduce_dtype: torch.dtype = getattr(torch, reduce_dtype)
        self.reduce_every_batch = reduce_every_batch
        self._root: _Root
        self._finishes = False  # has any backward gone through this strategy

    # Set-up ----------------------------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.model is not None
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        if self.packed:
            _check_phases(trainer)
        # Tensors that a gathered weight is made of live on: made in inference mode, no later training could use them.
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False

        self.model = self.precision_plugin.convert_module(self.model)
        self._root = self._shard(self.model)
        _materialize_distributed_module(self._root, self.root_device)
        self._root.to(self.root_device)
        # Taken now: while a block is gathered, these are not among the model's parameters.
        self._root.weights = [parameter for parameter in self.model.parameters() if _shard_of(parameter) is not None]
        self._finishes = False
        self.barrier()

        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _optimizers_to_device(self.optimizers, self.root_device)

    def _shard(self, model: nn.Module) -> _Root:
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        if "_quartet_root" in model.__dict__:  # of an earlier fit or validation
            root = model.__dict__["_quartet_root"]
            _forget_interrupted(root)
            return root
        if any(isinstance(module, FSDPModule) or _is_sharded(module) for module in model.modules()):
            raise MisconfigurationException(
                f"{type(model).__name__} shards its layers itself; choose ModelParallelStrategy, or leave the sharding "
                "to QuartetFSDP."
            )
        if torch.__version__ < "2.12" and any(isinstance(module, PackedQuartetLinear) for module in model.modules()):
            raise MisconfigurationException(
                f"FSDP2 of torch {torch.__version__} cannot shard packed weights (store_master_weights=False); install "
                "torch 2.12 or newer, or choose 'ddp'."
            )
        blocks = find_blocks(model, self.block_classes)
        _check_ties(model, blocks)
        sole = _sole_owners(model) if self.packed else []

        param_dtype = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        mesh = self.device_mesh["data_parallel"]
        policy = MixedPrecisionPolicy(param_dtype, self.reduce_dtype)
        for block in blocks:
            _pack_when_gathered(block, sole, self.root_device)
            fully_shard(block, mesh=mesh, reshard_after_forward=self.reshard_after_forward, mp_policy=policy)
        # The root sees whole batches, whose floats (targets, say) are not ours to cast.
        policy = MixedPrecisionPolicy(param_dtype, self.reduce_dtype, cast_forward_inputs=False)
        root = _Root(model, blocks)
        _pack_when_gathered(root, sole, self.root_device)
        fully_shard(root, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        inside = {module for block in blocks for module in block.modules()}
        for module in model.modules():
            if module not in inside and any(True for _ in module.parameters()):
                module.register_forward_pre_hook(root.gather)
        for name in _ENTRIES:
            if is_overridden(name, self.lightning_module):
                root.route(name)
        for name in ("toggle_optimizer", "untoggle_optimizer"):
            root.follow(name)
        model.__dict__["_quartet_root"] = root  # no submodule: it has the model as one
        return root

    # Gradients -------------------------------------------------------------------------------------------------------

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        assert self.lightning_module is not None
        self._root.gather()  # for one more backward through the same forward
        self.pre_backward(closure_loss)
        loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        with self._finish_gradients():
            self.precision_plugin.backward(loss, self.lightning_module, optimizer, *args, **kwargs)
        if self._root.running:
            self._root.outdate()
        loss = self.precision_plugin.post_backward(loss, self.lightning_module)
        self.post_backward(loss)
        return loss

    @contextmanager
    def _finish_gradients(self) -> Generator[None, None, None]:
        """Around a backward: mask and rotate back what it adds to the shards' gradients, and only that."""
        self._finishes = True
        weights = self._root.weights
        before = [weight.grad for weight in weights]
        shards = _shards_of(weights)
        for weight, shard in zip(weights, shards, strict=True):
            weight.grad = None
            shard.in_backward = True
        # Gradients of what reads a weight itself (a penalty, say) are not rotated; FSDP2 stores those of its layer
        # without calling hooks.
        direct: list[list[Tensor]] = [[] for _ in shards]
        hooks = [
            weight.register_hook(functools.partial(_set_aside, gradients))
            for weight, gradients in zip(weights, direct, strict=True)
            if weight.requires_grad
        ]
        try:
            yield
        except BaseException:
            self._root.interrupted = True
            raise
        finally:
            for hook in hooks:
                hook.remove()
            for shard in shards:
                shard.in_backward = False
        with torch.no_grad():
            for weight, shard, gradients, old in zip(weights, shards, direct, before, strict=True):
                if weight.grad is None:
                    weight.grad = old
                    continue
                shard.finish_gradient(weight.grad._local_tensor)  # type: ignore[attr-defined]
                for gradient in (*gradients, old):
                    if gradient is not None:
                        weight.grad += gradient

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        if not self._finishes and any(weight.grad is not None for weight in self._root.weights):
            raise MisconfigurationException(
                "Under QuartetFSDP a backward has to go through the strategy, which finishes the gradients of packed "
                "weights: call self.manual_backward(loss) instead of loss.backward()."
            )
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        for shard in _shards_of(self._root.weights):
            shard.is_packed = False  # also where an optimizer writes through `data`, which the shard does not see
        self._root.outdate()
        return result

    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call something other than ``forward`` and the steps that computes with the model, on all ranks.

        Args:
            method: For example ``model.generate``; what it calls in turn needs no such care.
            args: Its arguments.
            kwargs: Its arguments.

        Returns:
            What it returns.

        Example:
            ```python
            with torch.no_grad():
                tokens = trainer.strategy.call(module.model.generate, input_ids=prompt)
            ```
        """
        try:
            return self._root.run(method, *args, **kwargs)
        finally:
            if not torch.is_grad_enabled() and not self._root.running:
                self._root.free()

    # Between steps, callbacks and hooks find shards. A backward frees what it used; nothing follows an evaluation.

    @override
    def on_validation_end(self) -> None:
        self._root.free()

    @override
    def on_test_end(self) -> None:
        self._root.free()

    @override
    def on_predict_end(self) -> None:
        self._root.free()

    @override
    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Around batches after which no optimizer step follows."""
        if self.reduce_every_batch:
            yield
            return
        self._set_gradient_sync(False)
        try:
            yield
        finally:
            self._set_gradient_sync(True)

    def _set_gradient_sync(self, enabled: bool) -> None:
        self._root.set_requires_gradient_sync(enabled)  # type: ignore[operator]

    # Checkpoints -----------------------------------------------------------------------------------------------------

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Lightning's, which wants the state of every optimizer, also to evaluate after a fit."""
        assert self.lightning_module is not None
        optimizers = self.optimizers
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            self.optimizers = []
        try:
            return super().load_checkpoint(checkpoint_path, weights_only)
        finally:
            self.optimizers = optimizers

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state dict, of plain tensors or of DTensors of them: no class of this package gets into checkpoints."""
        return {name: _plain(value) for name, value in super().lightning_module_state_dict().items()}


def find_blocks(model: nn.Module, classes: Sequence[str] | None = None) -> list[nn.Module]:
    """The modules to gather and free as one, see `QuartetFSDP`.

    Raises:
        MisconfigurationException: If there is no module of one of the classes.
    """
    if classes is None:
        return list(dict.fromkeys(_repeated(model)))
    names = {_unwrapped(module): module for module in model.modules()}
    for name in classes:
        if not any(type(inner).__name__ == name for inner in names):
            raise MisconfigurationException(
                f"QuartetFSDP: block_classes has {name!r}, but {type(model).__name__} has no module of a class of that "
                "name; correct it or leave block_classes out."
            )
    found = [module for inner, module in names.items() if type(inner).__name__ in classes and module is not model]
    return found[::-1]  # FSDP2 takes inner modules before those around them


def _unwrapped(module: nn.Module) -> nn.Module:
    """What torch.compile or activation checkpointing wraps."""
    for name in ("_orig_mod", "_checkpoint_wrapped_module"):
        inner = module._modules.get(name)
        if inner is not None:
            return _unwrapped(inner)
    return module


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        members = [member for member in child.children() if any(True for _ in member.parameters())]
        with_layers = len(members) > 1 and all(any(True for _ in member.children()) for member in members)
        alike = len({type(_unwrapped(member)) for member in members}) == 1
        if with_layers and (isinstance(child, nn.ModuleList) or (isinstance(child, nn.Sequential) and alike)):
            yield from members
        else:
            yield from _repeated(child)


def _check_ties(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """A parameter belongs to one block, or to none."""
    numbers = {block: number for number, block in enumerate(blocks)}
    around: dict[str, int] = {}  # a module's path -> the innermost block around it, -1 outside of all
    owners: dict[nn.Parameter, int] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        parent = around.get(path.rpartition(".")[0], -1)
        around[path] = numbers.get(module, parent)
        for name, parameter in module.named_parameters(recurse=False):
            if owners.setdefault(parameter, around[path]) != around[path]:
                raise MisconfigurationException(
                    f"{path}.{name} is a parameter of another block too, and FSDP2 cannot shard it twice; untie it or "
                    "name a class around both in QuartetFSDP(block_classes=...)."
                )


def _sole_owners(model: nn.Module) -> list[QuartetLinear]:
    """The QuartetLinear layers with a weight that no other module has."""
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    return [
        module
        for module in model.modules()
        if isinstance(module, QuartetLinear)
        and not isinstance(module, PackedQuartetLinear)
        and all(
            owners[parameter] == 1 for name, parameter in module.named_parameters(recurse=False) if name == "weight"
        )
    ]


def _pack_when_gathered(block: nn.Module, sole: Sequence[QuartetLinear], device: torch.device) -> None:
    """Make the weights of these layers, where the block has them, ones that are gathered packed.

    They move to the device here: FSDP2 would do it next by assigning ``data``, which leaves the tensor inside behind.
    """
    inside = set(block.modules())
    for layer in sole:
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)  # for the type checker
        if layer in inside and not isinstance(weight, ShardedWeight) and not _is_sharded(layer):
            data = weight.detach()
            if data.device.type != "meta":
                data = data.to(device)
            shard = ShardedWeight(data, layer.out_features, layer.quartet_config)
            layer.weight = nn.Parameter(shard, weight.requires_grad)


def _forget_interrupted(root: _Root) -> None:
    """Drop what a fit that was interrupted left in FSDP2: gathered weights, and gradients that were not summed.

    Raises:
        MisconfigurationException: If FSDP2 cannot.
    """
    if root.interrupted:
        if not hasattr(root, "reset_iter_state"):
            raise MisconfigurationException(
                f"An exception ended the last fit of {type(root.module).__name__}, and FSDP2 of torch "
                f"{torch.__version__} keeps its state; make the model anew, with a checkpoint as ckpt_path."
            )
        root.reset_iter_state()  # type: ignore[operator]
        root.interrupted = False
    for module in (root, *root.blocks):
        group = module._get_fsdp_state()._fsdp_param_group  # type: ignore[operator]
        for parameter in () if group is None else group.fsdp_params:
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = parameter.unsharded_accumulated_grad = None


def _set_aside(kept: list[Tensor], gradient: Tensor) -> Tensor:
    kept.append(gradient)
    return torch.zeros_like(gradient)


def _shard_of(parameter: nn.Parameter) -> ShardedWeight | None:
    """The local rows of a parameter that is gathered packed."""
    local = getattr(parameter, "_local_tensor", None)
    return local if isinstance(local, ShardedWeight) else None


def _shards_of(weights: Sequence[nn.Parameter]) -> list[ShardedWeight]:
    return [shard for weight in weights if (shard := _shard_of(weight)) is not None]


def _is_sharded(module: nn.Module) -> bool:
    return any(map(_is_dtensor, module.parameters(recurse=False)))


def _plain(value: Any) -> Any:
    from torch.distributed.tensor import DTensor

    local = value._local_tensor if isinstance(value, DTensor) else value
    if not isinstance(local, ShardedWeight):
        return value
    if not isinstance(value, DTensor):
        return local.plain
    return DTensor.from_local(
        local.plain, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def _check_phases(trainer: pl.Trainer) -> None:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, QuartetQAT) and (callback.start_step > 0 or callback.end_step is not None):
            raise MisconfigurationException(
                f"QuartetQAT(start_step={callback.start_step}, end_step={callback.end_step}) has steps in high "
                "precision, and QuartetFSDP sends only 4-bit weights; choose QuartetFSDP(packed=False)."
            )
        if isinstance(callback, QuartetQAT) and callback.revert_on_end:
            raise MisconfigurationException(
                "QuartetQAT(revert_on_end=True) would leave plain layers with weights that QuartetFSDP gathers in "
                "4 bits; choose QuartetFSDP(packed=False), or leave it out."
            )
