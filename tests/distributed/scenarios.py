"""What the processes run, and the one process that they are compared with."""

import io
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_quartet import (
    QuartetConfig,
    QuartetFSDP,
    QuartetLinear,
    QuartetMonitor,
    QuartetQAT,
    set_quartet_step,
)
from lightning_quartet.gathered import ShardedWeight

warnings.filterwarnings("ignore", module="lightning")
EXACT = QuartetConfig(randomize_backward=False)
TOKENS = 32  # of a sample: a rank's share is a multiple of 32


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.relu(self.up(self.norm(x))))


class Net(pl.LightningModule):
    """Two residual blocks between an embedding and a head of one linear layer; the loss is a regression's.

    Args:
        hidden: Width inside the blocks.
        frozen: Whether the first block's ``up`` is frozen.
        checkpointing: Whether the blocks' activations are computed again in the backward.
        compiled: Whether the blocks are compiled.
        optimizer: Name of a class of ``torch.optim``.
        lr: Its learning rate.
        meta: Whether ``configure_model`` makes the layers, on the ``meta`` device.
        outputs: Outputs, at most 8.
        perturbed: If not zero, every parameter is changed by about 1e-7 of itself, with this seed.
    """

    def __init__(
        self,
        hidden: int = 64,
        frozen: bool = False,
        checkpointing: bool = False,
        compiled: bool = False,
        optimizer: str = "SGD",
        lr: float = 5e-3,
        meta: bool = False,
        outputs: int = 8,
        perturbed: int = 0,
    ) -> None:
        super().__init__()
        self.hidden, self.frozen, self.checkpointing, self.compiled = hidden, frozen, checkpointing, compiled
        self.optimizer, self.lr, self.meta, self.outputs = optimizer, lr, meta, outputs
        self.perturbed = perturbed
        self.losses: list[float] = []
        self.seeds: list[list[int]] = []
        self.blocks: nn.ModuleList | None = None
        if not meta:
            self.build()

    def build(self) -> None:
        torch.manual_seed(5)
        self.embedding = nn.Linear(8, 32)
        blocks = [Block(32, self.hidden) for _ in range(2)]
        blocks[0].up.requires_grad_(not self.frozen)
        if self.checkpointing:
            blocks = [checkpoint_wrapper(block) for block in blocks]
        if self.compiled:
            for block in blocks:
                block.compile(backend="aot_eager")
        self.blocks = nn.ModuleList(blocks)
        self.lm_head = nn.Linear(32, self.outputs)
        if self.perturbed:
            torch.manual_seed(self.perturbed)
            for parameter in self.parameters():
                parameter.data *= 1 + 1e-7 * torch.randn_like(parameter)

    def configure_model(self) -> None:
        if self.blocks is None:
            with torch.device("meta"):
                self.build()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)

    def loss(self, batch: Tensor) -> Tensor:
        return (self(batch) - batch.roll(1, -1)[..., : self.outputs]).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        layers = [module for module in self.modules() if isinstance(module, QuartetLinear)]
        self.seeds.append(layers[-1]._quartet_seed.tolist() if layers else [])
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)

    def on_train_end(self) -> None:
        # Lightning takes the shards off the GPUs next, where they cannot be gathered.
        model = self.trainer.strategy.model
        self.weights = summoned(model) if isinstance(model, FullyShardedDataParallel) else full(self.state_dict())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return getattr(torch.optim, self.optimizer)(parameters, lr=self.lr)


class ShardedNet(Net):
    """Shards itself, for ModelParallelStrategy."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)
        register_fsdp_forward_method(self, "training_step")


def make_trainer(world_size: int, strategy: Any, epochs: int, **options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {"accelerator": "cpu", "callbacks": [QuartetQAT(EXACT)], "max_epochs": epochs, **quiet, **options}
    options["use_distributed_sampler"] = False
    return pl.Trainer(devices=world_size, strategy=strategy, **options)


class FSDP1(FSDPStrategy):
    """``"fsdp"``, which Lightning and torch refuse on CPUs before they try; it works there."""

    def setup(self, trainer: pl.Trainer) -> None:
        from torch.distributed.fsdp import _common_utils, fully_sharded_data_parallel

        def use_cpu(state: Any, *args: Any) -> Any:
            state._device_handle = _common_utils._FSDPDeviceHandle.from_device(torch.device("cpu"))
            return state

        with pytest.MonkeyPatch.context() as patch:
            if not torch.cuda.is_available():
                patch.setattr(fully_sharded_data_parallel, "_init_device_handle", use_cpu)
            super().setup(trainer)


def batches(world_size: int, replicas: int, steps: int, global_batch: int = 4) -> DataLoader:
    """Samples [32, 8]; replica r of n gets every n-th, so that global batches are the same for all n."""
    data = torch.randn(global_batch * steps, TOKENS, 8, generator=torch.Generator().manual_seed(7))
    replica = int(os.environ.get("LOCAL_RANK", 0)) * replicas // world_size
    return DataLoader(data[replica::replicas], batch_size=global_batch // replicas)


def train(
    world_size: int = 2,
    strategy: str = "auto",
    steps: int = 3,
    model: dict[str, Any] | None = None,
    config: QuartetConfig = EXACT,
    fsdp: dict[str, Any] | None = None,
    kind: Callable[..., Net] = Net,
    data_steps: int | None = None,
    global_batch: int = 4,
    save: str | None = None,
    resume: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train for a number of optimizer steps, ``data_steps`` batches an epoch; the losses are those of this rank."""
    net = kind(**(model or {}))
    chosen: Any = QuartetFSDP(**fsdp) if fsdp is not None else strategy
    if strategy == "fsdp2":
        chosen = ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    if strategy == "fsdp1":
        chosen = FSDP1(auto_wrap_policy={Block})
    replicas = world_size
    if strategy == "tensor_parallel":  # of two ranks each
        replicas = world_size // 2
        chosen = ModelParallelStrategy(data_parallel_size=replicas, tensor_parallel_size=2)
    data_steps = data_steps or steps
    trainer = make_trainer(world_size, chosen, max(1, steps // data_steps), callbacks=[QuartetQAT(config)], **options)
    counters.clear()
    trainer.fit(net, batches(world_size, replicas, data_steps, global_batch), ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return {
        "losses": net.losses,
        "seeds": net.seeds,
        "logged": trainer.logged_metrics,
        "weights": net.weights,
        "strategy": type(trainer.strategy).__name__,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": dict(counters["graph_break"]),
    }


def summoned(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a model under FSDP1."""
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {
            name.replace("_fsdp_wrapped_module.", ""): parameter.detach().cpu().clone()
            for name, parameter in model.named_parameters()
        }


def full(state: dict[str, Any]) -> dict[str, Tensor]:
    """Plain tensors, gathered from all ranks."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().cpu().clone()
        for name, value in state.items()
    }


def mean_losses(results: Sequence[dict[str, Any]]) -> Tensor:
    return torch.tensor([result["losses"] for result in results], dtype=torch.float64).mean(0)


def count_bytes(**options: Any) -> dict[str, list[int]]:
    """Train; the bytes that this rank sends in each all-gather and gets from each reduce-scatter."""
    counts: dict[str, list[int]] = {"gathered": [], "reduced": []}
    newer = hasattr(torch.distributed, "all_gather_single")
    names = (
        ("all_gather_single", "reduce_scatter_single") if newer else ("all_gather_into_tensor", "reduce_scatter_tensor")
    )

    def counting(original: Callable[..., Any], counted: list[int], index: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counted.append([*args, *kwargs.values()][index].nbytes)
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, counted, index in zip(names, counts.values(), (1, 0), strict=True):
            patch.setattr(torch.distributed, name, counting(getattr(torch.distributed, name), counted, index))
        train(**options)
    return counts


def train_and_resume(folder: str, full: bool = False, strategy: str = "quartet_fsdp", **options: Any) -> dict[str, Any]:
    """Four steps at once, and two with a checkpoint and two more in another trainer."""
    path = f"{folder}/checkpoint"
    fsdp = {"save_distributed_checkpoint": not full} if strategy == "quartet_fsdp" else None
    options = {"config": QuartetConfig(), "data_steps": 2, "fsdp": fsdp, "strategy": strategy, **options}
    return {
        "whole": train(steps=4, **options),
        "first": train(steps=2, save=path, **options),
        "second": train(steps=4, resume=path, **options),
    }


class Recorder(Logger):
    """A logger that does not know that other ranks exist."""

    name = version = "recorder"

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.names += metrics

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def log_everything(strategy: str) -> dict[str, Any]:
    """What a rank reports in a training of one step: log messages, loggers' metrics, and those that callbacks see."""
    messages, recorder = io.StringIO(), Recorder()
    handler = logging.StreamHandler(messages)
    info = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    info.addHandler(handler)
    try:
        trainer = make_trainer(2, strategy, 1, callbacks=[QuartetQAT(), QuartetMonitor()], logger=recorder)
        trainer.fit(Net(), batches(2, 2, 1))
    finally:
        info.removeHandler(handler)
    return {
        "messages": [line for line in messages.getvalue().splitlines() if line.startswith("Quartet")],
        "logged": [name for name in recorder.names if name.startswith("quartet")],
        "metrics": {name: v.item() for name, v in trainer.callback_metrics.items() if name.startswith("quartet")},
    }


class Penalised(Net):
    """Its weights are drawn to one, in the loss of every batch."""

    def loss(self, batch: Tensor) -> Tensor:
        weights = [block.up.weight for block in self.blocks]
        penalties = [(weight - 1).square().sum() for weight in weights]
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in penalties]
        return super().loss(batch) + 0.1 * torch.stack(whole).sum()


class Probed(Net):
    """Asks for a gradient that it does not train with."""

    def loss(self, batch: Tensor) -> Tensor:
        weight = self.blocks[0].up.weight
        square = weight.square().sum()
        square = square.full_tensor() if hasattr(square, "full_tensor") else square
        (gradient,) = torch.autograd.grad(square, weight)
        self.probed = full({"": gradient})[""].norm().item()
        return super().loss(batch)

    def on_train_end(self) -> None:
        super().on_train_end()
        self.weights["probed"] = torch.tensor(self.probed)


class Manual(Net):
    """With manual optimization."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False


class Direct(Manual):
    """Goes around the strategy in it."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.loss(batch).backward()
        optimizer.step()


class Outside(Net):
    """With a layer that is in no block."""

    def build(self) -> None:
        super().build()
        self.middle = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.middle(self.features(x)))

    def features(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](self.embedding(x)))

    def describe(self, x: Tensor) -> Tensor:
        """Goes around ``forward``."""
        return self.middle(self.features(x))


class Repeated(Manual, Outside):
    """Two steps a batch, each with the gradients of two halves."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            for half in batch.chunk(2):
                loss = self.loss(half) / 2
                self.losses.append(loss.item())
                self.manual_backward(loss)
            optimizer.step()


class Disturbed(Outside):
    """Each batch sees other weights than those that are kept, written inside the step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.scale(1.5)
        return super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None:
        self.scale(1 / 1.5)

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        for parameter in self.blocks.parameters():
            parameter.mul_(factor)


class Prompted(Repeated):
    """Reads parameters in no block without calling their modules."""

    def build(self) -> None:
        super().build()
        self.prompts = nn.ParameterList([torch.ones(8)])

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x * self.prompts[0], self.embedding.weight, self.embedding.bias)
        return self.lm_head(self.middle(self.blocks[1](self.blocks[0](x))))


class Toggling(Repeated):
    """Trains two layers that are in no block in turn."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), 0.1) for layer in (self.middle, self.lm_head)]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch)
            self.losses.append(loss.item())
            self.manual_backward(loss)
            optimizer.step()  # gradients stay: those of the other layer must not be added to
            self.untoggle_optimizer(optimizer)


class Interrupted(Outside):
    """Its first batch fails once, in the forward or in the backward, or its fit is stopped after the first batch."""

    fail: str | None = None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = self.features(batch)
        if self.fail == "backward":
            x.register_hook(self.raise_)
        x = self.lm_head(self.middle(x))
        if self.fail == "forward":
            self.raise_()
        loss = (x - batch.roll(1, -1)).square().mean()
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, *arguments: Any) -> None:
        if self.fail == "stop":
            self.raise_()

    def raise_(self, *arguments: Any) -> None:
        raise ArithmeticError("stop")


def interrupt(world_size: int = 2, fail: str | None = None, fsdp: dict[str, Any] | None = None) -> list[float]:
    """The losses of a fit that follows one that was interrupted."""
    net = Interrupted()
    for net.fail in (fail, None):
        strategy = "auto" if fsdp is None else QuartetFSDP(**fsdp)
        net.losses.clear()
        trainer = make_trainer(world_size, strategy, 1, accumulate_grad_batches=2)
        try:
            trainer.fit(net, batches(world_size, world_size, 4))
        except ArithmeticError:
            assert net.fail is not None
    return net.losses


def validate_the_best(folder: str, full: bool, weights_only: bool) -> list[float]:
    """What a checkpoint was saved with, and what the same Trainer finds in it after the fit."""
    saving = pl.callbacks.ModelCheckpoint(folder, monitor="val_loss", save_weights_only=weights_only)
    strategy = QuartetFSDP(save_distributed_checkpoint=not full)
    trainer = make_trainer(2, strategy, 2, callbacks=[QuartetQAT(EXACT), saving], enable_checkpointing=True)
    net, held_out = Net(optimizer="AdamW"), batches(2, 2, 1)
    trainer.fit(net, batches(2, 2, 2), held_out)
    (found,) = trainer.validate(net, held_out, ckpt_path="best", verbose=False)
    return [saving.best_model_score.item(), found["val_loss"]]


def train_with_another_strategy() -> None:
    net = Net()
    make_trainer(2, "quartet_fsdp", 1).fit(net, batches(2, 2, 1))
    make_trainer(1, "auto", 1).fit(net, batches(1, 1, 1))


class Looking(pl.Callback):
    """Looks at a weight where no step is under way, and calls what is neither ``forward`` nor a step."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Outside, optimizer: Any) -> None:
        pl_module(torch.ones(2, 32, 8))  # with gradients that nobody wants

    def look(self, module: Outside) -> None:
        self.seen.append(type(getattr(module.middle.weight, "_local_tensor", module.middle.weight)).__name__)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Outside) -> None:  # after the sanity check
        self.look(pl_module)
        with torch.inference_mode():
            pl_module(torch.ones(2, 32, 8))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Outside, *rest: Any) -> None:
        self.look(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Outside) -> None:
        x = torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            fsdp = isinstance(trainer.strategy, QuartetFSDP)
            self.described = trainer.strategy.call(pl_module.describe, x) if fsdp else pl_module.describe(x)
        self.look(pl_module)


def look(world_size: int = 2, kind: type[Outside] = Outside, fsdp: dict[str, Any] | None = None) -> dict[str, Any]:
    """A training with validations and a monitor: what hooks see."""
    looking, monitor = Looking(), QuartetMonitor(every_n_steps=1)
    strategy = "auto" if fsdp is None else QuartetFSDP(**fsdp)
    trainer = make_trainer(world_size, strategy, 1, callbacks=[QuartetQAT(EXACT), monitor, looking])
    net = kind()
    trainer.fit(net, batches(world_size, world_size, 2), batches(world_size, world_size, 1))
    return {"seen": looking.seen, "described": looking.described, "measured": monitor.latest, "losses": net.losses}


class Tied(Net):
    """Its two blocks share a layer."""

    def build(self) -> None:
        super().build()
        self.blocks[1].up = self.blocks[0].up


def refuse(kind: type[Net] = Net, qat: dict[str, Any] | None = None, averaging: str | None = None, **fsdp: Any) -> None:
    """A training that must not begin."""
    callbacks: list[Any] = [QuartetQAT(**(qat or {}))]
    if averaging is not None:
        options = {"swa_lrs": 0.1} if averaging == "StochasticWeightAveraging" else {}
        callbacks.append(getattr(pl.callbacks, averaging)(**options))
    make_trainer(2, QuartetFSDP(**fsdp), 1, callbacks=callbacks).fit(kind(), batches(2, 2, 1))


class AdaptedNet(Net):
    """With LoRA on frozen blocks."""

    def build(self) -> None:
        import peft

        super().build()
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, self)


class ParallelNet(Net):
    """Each block cut over two ranks, for ModelParallelStrategy; the rest is whole on all."""

    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}

    def configure_model(self) -> None:
        mesh = self.device_mesh
        for block in self.blocks:
            parallelize_module(block, mesh["tensor_parallel"], self.plan)
        if mesh["data_parallel"].size() > 1:
            for block in self.blocks:
                fully_shard(block, mesh=mesh["data_parallel"])
            fully_shard(self, mesh=mesh["data_parallel"])
            register_fsdp_forward_method(self, "training_step")


def halves(rounding: str) -> Tensor:
    """The gradient of this rank's half of a weight, where both halves have the same rows and the same gradients."""
    generator = torch.Generator().manual_seed(3)
    x, half, dy = (torch.randn(shape, generator=generator) for shape in ((64, 32), (32, 32), (64, 32)))
    layer = QuartetLinear(
        32, 64, bias=False, config=QuartetConfig(backward_rounding=rounding, randomize_backward=False)
    )
    layer.weight.data.copy_(half.repeat(2, 1))
    model = nn.Sequential(layer)
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
    set_quartet_step(model, 1, rank=0)
    model(x).backward(dy)
    return layer.weight.grad.to_local()


class MixedNet(ParallelNet):
    """With a layer that every rank has whole; what comes before it feels its gradient."""

    def build(self) -> None:
        super().build()
        self.whole = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        x = x + self.whole(x)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)

    def on_train_end(self) -> None:
        self.weights = {name: full({name: value})[name] for name, value in self.state_dict().items()}


class CutNet(ParallelNet):
    """Cut so that a rank gets half a group."""

    plan = {"up": RowwiseParallel(input_layouts=Replicate())}


def train_from_meta() -> dict[str, Any]:
    """A model that is made on the ``meta`` device: the classes of its weights, and its losses."""
    net = Net(meta=True)
    make_trainer(2, "quartet_fsdp", 1).fit(net, batches(2, 2, 2))
    return {
        "losses": net.losses,
        "sharded": [name for name, value in net.named_parameters() if isinstance(value._local_tensor, ShardedWeight)],
        "devices": {value.device.type for value in net.parameters()},
    }


def dtypes(precision: str) -> dict[str, Any]:
    """Dtypes while a block runs, and of the masters."""
    net, seen = Net(), {}
    original = Block.forward

    def forward(block: Block, x: Tensor) -> Tensor:
        seen.update(up=block.up.weight.dtype, kind=type(block.up.weight).__name__, norm=block.norm.weight.dtype)
        return original(block, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "forward", forward)
        make_trainer(2, "quartet_fsdp", 1, precision=precision).fit(net, batches(2, 2, 2))
    local = net.blocks[0].up.weight
    return {**seen, "master": local.dtype, "losses": net.losses}


def everything_but_training() -> list[Any]:
    """Validation, a training, validation and prediction with one model; and a call outside of any step."""
    net = Net()
    data = batches(2, 2, 2)
    results: list[Any] = []
    for stage in ("validate", "fit", "validate", "predict"):
        trainer = make_trainer(2, QuartetFSDP(), 1)
        result = getattr(trainer, stage)(net, data)
        if stage == "validate":
            results.append(result[0]["val_loss"])
    with torch.no_grad():
        results.append(net(next(iter(data))).shape)
    return results


def run_command(arguments: list[str]) -> None:
    """The command line in this process."""
    from lightning_quartet.__main__ import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lightning-quartet", *arguments])
        main()
