"""What training a model of 8 billion parameters takes on many GPUs, computed from what was measured on few.

    python examples/distributed/expect.py measured.jsonl --write examples/distributed/README.md

Reads the lines that ``benchmark.py`` prints: ``fsdp2-bf16`` and ``quartet-fsdp`` of one model, and ``quartet-fsdp`` of
the one with 32 layers, all on the same number of GPUs. Without a file it computes traffic and nominal times alone.
"""

import argparse
import json
from pathlib import Path
from typing import Any

BLOCK = 4096 * (4096 + 1024 + 1024 + 4096 + 3 * 14336)  # weights of a block's linear layers
LINEAR, OTHERS = 32 * BLOCK, 2 * 128256 * 4096  # in blocks; embedding and head, gathered once a step in bfloat16
PARAMETERS = LINEAR + OTHERS
NVLINK, ADAPTER = 450e9, 50e9  # nominal bytes a second: of a GPU in each direction; of 400 Gb/s
NODE = 8  # GPUs
BEGIN, END = "<!-- computed by expect.py -->", "<!-- end -->"

WAYS = {  # name: bytes a gathered element of a linear layer, bytes an element in sums
    "FSDP2, bfloat16 gathers, float32 sums": (2, 4),
    "`quartet_fsdp`, float32 sums": (17 / 32, 4),
    "FSDP2, bfloat16 gathers and sums": (2, 2),
    '`quartet_fsdp`, `reduce_dtype="bfloat16"`': (17 / 32, 2),
}
PLACES = {  # name: GPUs, nominal bytes a second that a ring through all of them carries
    "8 GPUs, NVLink": (8, NVLINK),
    "64 GPUs, 8 adapters a node": (64, NODE * ADAPTER),
    "512 GPUs, 8 adapters": (512, NODE * ADAPTER),
    "64 GPUs, 1 adapter": (64, ADAPTER),
    "512 GPUs, 1 adapter": (512, ADAPTER),
}


def traffic(gathered: float, summed: float) -> tuple[float, float]:
    """Bytes of one step: in gathers (linear layers for the forward and for the backward, the others once), in sums."""
    return 2 * LINEAR * gathered + 2 * OTHERS, PARAMETERS * summed


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def nominal() -> str:
    amounts = {name: traffic(*sizes) for name, sizes in WAYS.items()}
    rows = [
        [name, *(f"{value / 1e9:.1f} GB" for value in (gathers, sums, gathers + sums))]
        for name, (gathers, sums) in amounts.items()
    ]
    first = table(["", "gathered", "summed", "together"], rows)
    rows = [
        [name, *(f"{sum(amount) * (n - 1) / n / speed:.2f}" for n, speed in PLACES.values())]
        for name, amount in amounts.items()
    ]
    second = table(["", *PLACES], rows)
    return f"""**Computed, not measured**, for a model of Llama-3-8B's shape: {LINEAR / 1e9:.2f} billion parameters in
QuartetLinear layers, {OTHERS / 1e9:.2f} billion in embedding and head. Bytes of one step that a GPU receives in gathers
and sends in sums, times (n - 1) / n:

{first}

Gathered: linear layers twice (forward, backward), 17/32 or 2 bytes an element; embedding and head once, 2 bytes.

Seconds that this takes at the links' nominal speed, **computed**. In a node of 8 GPUs NVLink carries 450 GB/s in each
direction and GPU. Between nodes with a 400 Gb/s adapter for each GPU a ring carries 8 x 50 GB/s; with a single adapter
in a node, 50 GB/s.

{second}
"""


def expected(lines: list[dict[str, Any]]) -> str:
    big = next((line for line in lines if line["mode"] == "quartet-fsdp" and line["layers"] == 32), {"gpus": 0})
    small = {line["mode"]: line for line in lines if line["gpus"] == big["gpus"] and line["layers"] != 32}
    packed, plain = small.get("quartet-fsdp"), small.get("fsdp2-bf16")
    if packed is None or plain is None or packed["layers"] != plain["layers"]:
        raise SystemExit(
            "The file needs lines of fsdp2-bf16 and quartet-fsdp on one model, and of quartet-fsdp with 32 layers, all "
            "on as many GPUs; measure them with benchmark.py."
        )
    n = big["gpus"]
    reached = big["wire_bytes_per_step"] / big["profiled_step"]["nccl_s"] / NVLINK
    compute = big["profiled_step"]["others_s"]
    computes = (compute * plain["profiled_step"]["others_s"] / packed["profiled_step"]["others_s"], compute)
    names = list(WAYS)[:2]
    rows = []
    for name, time in zip(names, computes, strict=True):
        row = [name]
        for gpus, speed in PLACES.values():
            wire = sum(traffic(*WAYS[name])) * (gpus - 1) / gpus / (speed * reached)
            row.append(f"{max(time, wire):.2f} to {time + wire:.2f}")
        rows.append(row)
    state = 16 * PARAMETERS
    memory = ", ".join(
        f"{(big['peak_gib'] * 2**30 - state / n + state / gpus) / 1e9:.0f} GB on {gpus}" for gpus in (8, 64, 512)
    )
    tokens, gpu, peak = big["tokens_per_gpu"], big["gpu"], big["peak_gib"] * 2**30 / 1e9
    return f"""
Seconds of a step of {tokens} tokens on each GPU, **computed** from runs on {n} GPUs ({gpu}): kernels other than
NCCL's took {compute:.2f} s there with `quartet_fsdp`, {computes[0]:.2f} s with bfloat16 (by the ratio of the same on
{packed["layers"]} layers), and NCCL moved its bytes at {reached:.0%} of NVLink's nominal speed, a share assumed of
all links. NCCL's time includes waiting for the slowest rank, which weighs most in steps of few tokens and least on slow
links, so these are upper estimates. The first number has all of the traffic hidden behind computation, the second
nothing.

{table(["", *PLACES], rows)}

Measured on {n} GPUs: {big["step_s"]:.2f} s a step, {peak:.0f} GB a GPU at most. With 16 bytes of weights, gradients and
AdamW states a parameter spread over more GPUs that is, **computed**, {memory}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", nargs="?", type=Path, help="lines printed by benchmark.py")
    parser.add_argument("--write", type=Path, help="put the text between the markers of this file")
    options = parser.parse_args()
    text = nominal()
    if options.measured is not None:
        lines = map(json.loads, options.measured.read_text().splitlines())
        text += expected([line for line in lines if "step_s" in line])
    if options.write is None:
        print(text)
        return
    before, rest = options.write.read_text().split(BEGIN)
    options.write.write_text(f"{before}{BEGIN}\n{text}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
