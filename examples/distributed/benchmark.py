"""Step time, memory and traffic of a Llama-shaped model on the GPUs of one node, one way of training per call:

    torchrun --nproc-per-node 4 examples/distributed/benchmark.py --mode quartet-fsdp

Prints one line of JSON, from rank 0. Modes: ``ddp``, ``fsdp1`` and ``fsdp2``, each with bfloat16 linear layers
(``-bf16``) or Quartet's (``-quartet``); ``quartet-fsdp`` gathers 4-bit weights. ``fsdp2-*`` and ``quartet-fsdp`` differ
in nothing else: the same blocks, bfloat16 for what is not packed, sums in float32. ``fsdp1`` is Lightning's, which
under ``bf16-mixed`` gathers and sums in bfloat16. With one process, ``ddp-*`` runs without any strategy: the
time that ratios on one GPU are taken from. Activations between the blocks are bfloat16 in all modes.
"""

import argparse
import json
import math
import os
import resource
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, Literal, NoReturn

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.utils.data import DataLoader

from lightning_quartet import QuartetConfig, QuartetFSDP, QuartetQAT
from lightning_quartet.moments import now, seconds

MODES = ("ddp-bf16", "ddp-quartet", "fsdp1-bf16", "fsdp1-quartet", "fsdp2-bf16", "fsdp2-quartet", "quartet-fsdp")
COLLECTIVES = {
    "c10d::_allgather_base_": "gathered",
    "c10d::_reduce_scatter_base_": "reduce_scattered",
    "c10d::allreduce_": "all_reduced",
}
NCCL_SIZES = {"Byte": 1, "BFloat16": 2, "Half": 2, "Float": 4, "Double": 8, "Long": 8}
SIZES = {"unsigned char": 1, "c10::BFloat16": 2, "c10::Half": 2, "float": 4, "double": 8, "long int": 8}


class Block(nn.Module):
    """A Llama block: grouped-query attention with rotary positions, SwiGLU, RMSNorm."""

    def __init__(self, dim: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = heads, kv_heads, dim // heads
        self.attention_norm, self.norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.q, self.o = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, kv_heads * self.head, bias=False)
        self.v = nn.Linear(dim, kv_heads * self.head, bias=False)
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.attention_norm(x)
        q, k, v = (layer(h).unflatten(-1, (-1, self.head)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.o(h.transpose(1, 2).flatten(2))
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Model(pl.LightningModule):
    """Layers are made in ``configure_model``, on the ``meta`` device where the strategy shards them."""

    def __init__(self, options: argparse.Namespace, meta: bool) -> None:
        super().__init__()
        self.options, self.meta = options, meta
        self.blocks: nn.ModuleList | None = None
        self.last_loss = torch.zeros(())
        self.count = 0

    def configure_model(self) -> None:
        if self.blocks is not None:
            return
        o = self.options
        with torch.device("meta") if self.meta else self.trainer.strategy.root_device:
            self.embedding = nn.Embedding(o.vocabulary, o.dim)
            self.blocks = nn.ModuleList(Block(o.dim, o.hidden, o.heads, o.kv_heads) for _ in range(o.layers))
            self.norm = nn.RMSNorm(o.dim)
            self.lm_head = nn.Linear(o.dim, o.vocabulary, bias=False)
        self.count = sum(parameter.numel() for parameter in self.parameters())
        if not o.no_compile:
            for block in self.blocks:
                block.compile()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).bfloat16()
        head = self.options.dim // self.options.heads
        frequencies = 500000 ** (-torch.arange(0, head, 2, device=x.device) / head)
        angles = torch.arange(tokens.shape[1], device=x.device)[:, None] * frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.lm_head(self.norm(x))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        self.last_loss = loss.detach()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4, fused=True)


class Measure(pl.Callback):
    """Times whole steps, from the end of one to the end of the next; then profiles one, prints and saves."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.ends: list[Any] = []
        self.profiler: torch.profiler.profile | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.options.warm_up + self.options.steps:
            synchronize()
            self.profiler = torch.profiler.profile(record_shapes=True)
            self.profiler.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.profiler is None:
            self.ends.append(now(trainer.strategy.root_device))
        else:
            synchronize()
            self.profiler.__exit__(None, None, None)

    def on_train_end(self, trainer: pl.Trainer, model: Any) -> NoReturn:
        # Steps are not waited for one by one, so that the host can run ahead of the GPU as in any training.
        ends = self.ends[-self.options.steps - 1 :]
        times = [seconds(start, end) for start, end in zip(ends, ends[1:], strict=False)]
        if trainer.is_global_zero:
            assert self.profiler is not None
            print(json.dumps(self.result(trainer, model, times, events_of(self.profiler))), flush=True)
        if self.options.checkpoint:
            start = time.perf_counter()
            trainer.save_checkpoint(self.options.checkpoint)
            if trainer.is_global_zero:
                files = [path for path in Path(self.options.checkpoint).rglob("*") if path.is_file()]
                saved = {
                    "mode": self.options.mode,
                    "saved_s": round(time.perf_counter() - start, 2),
                    "saved_bytes": sum(path.stat().st_size for path in files),
                    "host_peak_gib_rank_0": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
                }
                print(json.dumps(saved), flush=True)
        trainer.strategy.barrier()
        os._exit(0)  # else Lightning copies weights and optimizer states to the host's memory

    def result(
        self, trainer: pl.Trainer, model: Model, times: list[float], events: list[dict[str, Any]]
    ) -> dict[str, Any]:
        cuda, tokens, step = torch.cuda.is_available(), self.options.batch * self.options.sequence, median(times)
        traffic = traffic_of(events, 2 if self.options.reduce_dtype == "bfloat16" else 4)
        return {
            "mode": self.options.mode,
            "gpus": trainer.world_size,
            "gpu": torch.cuda.get_device_name() if cuda else "none",
            "layers": self.options.layers,
            "parameters": model.count,
            "tokens_per_gpu": tokens,
            "step_s": round(step, 5),
            "fastest_and_slowest_s": [round(min(times), 5), round(max(times), 5)],
            "tokens_per_s_per_gpu": round(tokens / step, 1),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if cuda else None,
            "bytes_per_step": traffic,
            "wire_bytes_per_step": round(on_the_wire(traffic, trainer.world_size)),
            "nccl_bytes_per_step": nccl_traffic(events),
            "profiled_step": kernel_times(events),
            "loss": round(float(model.last_loss), 4),
        }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def events_of(profiler: torch.profiler.profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def traffic_of(events: list[dict[str, Any]], summed: int) -> dict[str, int]:
    """Bytes of one step's collectives on a rank, from the tensors that torch was given: what gathers give, and what
    sums take, whose elements have `summed` bytes."""
    total: dict[str, int] = {}
    for event in events:
        kind = COLLECTIVES.get(event.get("name", ""))
        if kind is None or event.get("cat") != "cpu_op":
            continue
        shapes, types = event["args"]["Input Dims"], event["args"]["Input type"]
        # The profiler does not tell the type of tensors in a list, which all-reduces take.
        tensors = [(shape, SIZES.get(name, summed)) for shape, name in zip(shapes, types, strict=True)]
        total[kind] = total.get(kind, 0) + max(_elements(shape) * size for shape, size in tensors)
    return total


def on_the_wire(traffic: dict[str, int], gpus: int) -> float:
    """What a ring moves into one GPU: (n - 1) / n of a gather or scattered sum, twice that of an all-reduce."""
    return (sum(traffic.values()) + traffic.get("all_reduced", 0)) * (gpus - 1) / gpus


def nccl_traffic(events: list[dict[str, Any]]) -> dict[str, int]:
    """The same bytes by another way: the message sizes that NCCL's own kernels carry in the trace."""
    total: dict[str, int] = {}
    for event in events:
        args = event.get("args", {})
        if event.get("cat") == "kernel" and "Collective name" in args:
            elements = max(args.get("In msg nelems", 0), args.get("Out msg nelems", 0))
            name = args["Collective name"]
            total[name] = total.get(name, 0) + elements * NCCL_SIZES.get(args.get("dtype"), 0)
    return total


def kernel_times(events: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of NCCL's kernels, of all others, and of NCCL's while no other ran: of the step that was profiled."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in kernels:
        spans["nccl" in event["name"].lower()].append((event["ts"], event["ts"] + event["dur"]))
    nccl, others, both = covered(spans[True]), covered(spans[False]), covered(spans[True] + spans[False])
    return {"nccl_s": round(nccl, 5), "others_s": round(others, 5), "nccl_alone_s": round(both - others, 5)}


def covered(spans: list[tuple[float, float]]) -> float:
    """Seconds in which at least one of the spans, in microseconds, runs."""
    total, last = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total / 1e6


def _elements(shape: list[Any]) -> int:
    if shape and isinstance(shape[0], list):
        return sum(map(_elements, shape))
    return math.prod(shape) if shape else 0


def strategy(mode: str, devices: int, reduce_dtype: Literal["float32", "bfloat16"]) -> Any:
    if mode.startswith("ddp"):
        hook = bf16_compress_hook if reduce_dtype == "bfloat16" else None
        return DDPStrategy(gradient_as_bucket_view=True, ddp_comm_hook=hook) if devices > 1 else "auto"
    if mode.startswith("fsdp1"):
        return FSDPStrategy(auto_wrap_policy={Block})
    return QuartetFSDP(packed=mode == "quartet-fsdp", reduce_dtype=reduce_dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=2, help="sequences on each GPU")
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--recompute-inputs", action="store_true", help="QuartetConfig(recompute_inputs=True)")
    parser.add_argument(
        "--reduce-dtype", choices=("float32", "bfloat16"), default="float32", help="of summed gradients, not for fsdp1"
    )
    parser.add_argument("--checkpoint", help="save one to this folder at the end")
    parser.add_argument("--cpu", action="store_true", help="to try this script")
    options = parser.parse_args()

    devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_float32_matmul_precision("high")
    callbacks: list[pl.Callback] = [Measure(options)]
    if "quartet" in options.mode:
        callbacks.append(QuartetQAT(QuartetConfig(recompute_inputs=options.recompute_inputs)))
    trainer = pl.Trainer(
        accelerator="cpu" if options.cpu else "gpu",
        devices=devices,
        strategy=strategy(options.mode, devices, options.reduce_dtype),
        precision="bf16-mixed",
        callbacks=callbacks,
        max_steps=options.warm_up + options.steps + 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    pl.seed_everything(1)
    sharded = options.mode in ("fsdp2-bf16", "fsdp2-quartet", "quartet-fsdp")
    model = Model(options, meta=sharded)
    count = trainer.max_steps * options.batch * devices
    data = torch.randint(options.vocabulary, (count, options.sequence + 1))
    trainer.fit(model, DataLoader(data, batch_size=options.batch))


if __name__ == "__main__":
    main()
