"""examples/distributed, cut to a few steps on two processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import scenarios
from small_examples import short_corpus, sizes

ROOT = Path(__file__).parents[2]


def small(folder):
    """Options for a small model on a few speeches, written to the folder."""
    return [f"--trainer.logger.init_args.save_dir={folder}", *sizes(folder, short_corpus(folder))]


def test_the_configuration_trains_and_saves(ranks, tmp_path):
    arguments = [
        "fit",
        f"--config={ROOT / 'examples' / 'distributed' / 'config.yaml'}",
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        "--trainer.limit_val_batches=1",
        "--trainer.callbacks.init_args.every_n_train_steps=2",  # of the last callback
        *small(tmp_path),
    ]
    ranks(scenarios.run_command, arguments=arguments)
    folders = list(tmp_path.glob("distributed/version_0/checkpoints/*.ckpt"))
    assert len(folders) == 1
    assert {path.name for path in folders[0].iterdir()} >= {".metadata", "meta.pt"}


def test_a_recipe_that_ends_with_generated_text_runs_sharded(ranks, tmp_path):
    arguments = [
        "fit",
        f"--config={ROOT / 'examples' / 'language_model' / 'config.yaml'}",
        "--trainer.strategy=quartet_fsdp",
        "--trainer.devices=2",
        "--trainer.max_steps=2",
        "--trainer.limit_val_batches=1",
        "--data.init_args.validation_documents=2",
        *small(tmp_path),
    ]
    ranks(scenarios.run_command, arguments=arguments)
    (sample,) = tmp_path.rglob("sample.txt")
    assert sample.read_text().startswith("My fellow Americans,")


def expectations(*arguments):
    script = ROOT / "examples" / "distributed" / "expect.py"
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True).stdout


def test_the_page_says_what_the_script_computes(tmp_path):
    page = ROOT / "examples" / "distributed" / "README.md"
    measured = ROOT / "benchmarks" / "results" / "distributed_4xh100.jsonl"
    copy = tmp_path / "README.md"
    copy.write_text(page.read_text())
    expectations(measured, "--write", copy)
    assert copy.read_text() == page.read_text()


def test_expectations_from_measured_steps(tmp_path):
    def line(mode, layers, others, **values):
        profile = {"nccl_s": 0.1, "others_s": others, "nccl_alone_s": 0.0}
        return json.dumps(
            {"mode": mode, "layers": layers, "gpus": 2, "profiled_step": profile, "step_s": 0.5, **values}
        )

    big = {"gpu": "X", "tokens_per_gpu": 8192, "wire_bytes_per_step": 22.5e9, "peak_gib": 93.1322}
    lines = [line("fsdp2-bf16", 8, 0.4), line("quartet-fsdp", 8, 0.3), line("quartet-fsdp", 32, 1.2, **big)]
    (tmp_path / "measured.jsonl").write_text("\n".join([*lines, '{"mode": "quartet-fsdp", "saved_s": 3.0}']))
    text = expectations(tmp_path / "measured.jsonl")
    assert "moved its bytes at 50% of NVLink's nominal speed" in text
    # 62.1 and 41.6 GB: 7/8 of them at 225 GB/s, and 63/64 at 25 GB/s.
    assert "| FSDP2, bfloat16 gathers, float32 sums | 1.60 to 1.84 |" in text
    packed = next(row for row in text.splitlines() if row.startswith("| `quartet_fsdp`, float32 sums | 1.20 to 1.36 |"))
    assert "| 1.64 to 2.84 |" in packed
    assert "52 GB on 8, 38 GB on 64, 36 GB on 512" in text  # 100 - 64.2 + 128.5 / n


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["ddp-quartet", "fsdp2-bf16", "fsdp2-quartet", "quartet-fsdp"])
def test_the_benchmark_counts_bytes(mode, dtype):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    size = "--layers 2 --dim 64 --hidden 128 --heads 2 --kv-heads 1 --vocabulary 256 --sequence 32 --batch 1"
    steps = f"--warm-up 1 --steps 2 --cpu --no-compile --recompute-inputs --reduce-dtype {dtype}"
    script = ROOT / "examples" / "distributed" / "benchmark.py"
    done = subprocess.run(
        [*launch, script, "--mode", mode, *size.split(), *steps.split()], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    weights, norms, root = 2 * 36864, 2 * 128, 2 * 256 * 64 + 64
    traffic = {"all_reduced": (4 if dtype == "float32" else 2) * (weights + norms + root)}
    if mode != "ddp-quartet":
        size_of_weight = 17 / 32 if mode == "quartet-fsdp" else 2
        gathered = 2 * (weights * size_of_weight + 2 * norms) + 2 * root
        traffic = {"gathered": gathered, "reduce_scattered": traffic["all_reduced"]}
    assert json.loads(line)["bytes_per_step"] == traffic
