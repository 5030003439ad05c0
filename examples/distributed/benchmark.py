"""Step time, memory and traffic of a Llama-shaped model on the GPUs of one node, one way of training per call:

    torchrun --nproc-per-node 4 examples/distributed/benchmark.py --mode quartet-fsdp

Prints one line of JSON, from rank 0. Modes: ``ddp``, ``fsdp1`` and ``fsdp2``, each with bfloat16 linear layers
(``-bf16``) or Quartet's (``-quartet``); ``quartet-fsdp`` gathers 4-bit weights. ``fsdp2-*`` and ``quartet-fsdp`` differ
in nothing else: the same blocks, bfloat16 for what is not packed, sums in float32. With one process, ``ddp-*`` runs
without any strategy: the time that ratios on one GPU are taken from.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_quartet import QuartetFSDP, QuartetQAT

MODES = ("ddp-bf16", "ddp-quartet", "fsdp1-bf16", "fsdp1-quartet", "fsdp2-bf16", "fsdp2-quartet", "quartet-fsdp")
COLLECTIVES = {
    "c10d::_allgather_base_": "gathered",
    "c10d::_reduce_scatter_base_": "reduce_scattered",
    "c10d::allreduce_": "all_reduced",
}
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
        self.last_loss = 0.0

    def configure_model(self) -> None:
        if self.blocks is not None:
            return
        o = self.options
        with torch.device("meta" if self.meta else "cpu"):
            self.embedding = nn.Embedding(o.vocabulary, o.dim)
            self.blocks = nn.ModuleList(Block(o.dim, o.hidden, o.heads, o.kv_heads) for _ in range(o.layers))
            self.norm = nn.RMSNorm(o.dim)
            self.lm_head = nn.Linear(o.dim, o.vocabulary, bias=False)
        if not o.no_compile:
            for block in self.blocks:
                block.compile()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        frequencies = 500000 ** (-torch.arange(0, self.options.dim // self.options.heads, 2, device=x.device) / 128)
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
        return torch.optim.AdamW(self.parameters(), 1e-4, fused=self.device.type == "cuda")


class Measure(pl.Callback):
    """Times whole steps; then profiles one."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.warm_up, self.steps = warm_up, steps
        self.times: list[float] = []
        self.traffic: dict[str, int] = {}
        self.profiler: torch.profiler.profile | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.warm_up + self.steps:
            self.profiler = torch.profiler.profile(record_shapes=True)
            self.profiler.__enter__()
        self.start = _now()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.times.append(_now() - self.start)
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            self.traffic = _traffic(self.profiler)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _traffic(profiler: torch.profiler.profile) -> dict[str, int]:
    """Bytes of one step's collectives on a rank: what gathers give, and what sums take."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    total: dict[str, int] = {}
    for event in events:
        kind = COLLECTIVES.get(event.get("name", ""))
        if kind is None or event.get("cat") != "cpu_op":
            continue
        shapes, types = event["args"]["Input Dims"], event["args"]["Input type"]
        # An all-reduce has a list of tensors, whose type the profiler does not tell; gradients are float32 here.
        tensors = [(shape, SIZES.get(name, 4)) for shape, name in zip(shapes, types, strict=True)]
        total[kind] = total.get(kind, 0) + max(_elements(shape) * size for shape, size in tensors)
    return total


def _elements(shape: list[Any]) -> int:
    if shape and isinstance(shape[0], list):
        return sum(map(_elements, shape))
    return math.prod(shape) if shape else 0


def strategy(mode: str, devices: int) -> Any:
    if mode.startswith("ddp"):
        return "ddp" if devices > 1 else "auto"
    if mode.startswith("fsdp1"):
        return FSDPStrategy(auto_wrap_policy={Block})
    return QuartetFSDP(packed=mode == "quartet-fsdp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--layers", type=int, default=8, help="32 make a model of 8 billion parameters")
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=2, help="sequences on each GPU")
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--checkpoint", help="save one here at the end")
    parser.add_argument("--cpu", action="store_true", help="to try this script")
    options = parser.parse_args()

    devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_float32_matmul_precision("high")
    measure = Measure(options.warm_up, options.steps)
    callbacks: list[pl.Callback] = [measure]
    if "quartet" in options.mode:
        callbacks.append(QuartetQAT())
    trainer = pl.Trainer(
        accelerator="cpu" if options.cpu else "gpu",
        devices=devices,
        strategy=strategy(options.mode, devices),
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

    timed = measure.times[options.warm_up : -1]
    seconds = statistics.median(timed)
    saving = None
    if options.checkpoint:
        start = _now()
        trainer.save_checkpoint(options.checkpoint)
        saving = _now() - start
    if trainer.is_global_zero:
        cuda = torch.cuda.is_available()
        result = {
            "mode": options.mode,
            "gpus": devices,
            "gpu": torch.cuda.get_device_name() if cuda else "none",
            "layers": options.layers,
            "tokens_per_gpu": options.batch * options.sequence,
            "step_s": round(seconds, 5),
            "fastest_and_slowest_s": [round(min(timed), 5), round(max(timed), 5)],
            "tokens_per_s_per_gpu": round(options.batch * options.sequence / seconds, 1),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if cuda else None,
            "bytes_per_step": measure.traffic,
            "loss": round(float(model.last_loss), 4),
            "save_s": saving,
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
