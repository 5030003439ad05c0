"""Every error that a public docstring documents is raised here; a new one without a line in this file fails."""

import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from lightning_quartet import (
    QuartetConfig,
    QuartetFSDP,
    QuartetLinear,
    QuartetMonitor,
    QuartetPrecision,
    QuartetQAT,
    convert_to_quartet,
    metrics,
    pack_quartet,
    revert_from_quartet,
    set_quartet_step,
)
from lightning_quartet.strategies.fsdp import find_blocks
from quartet_kernels import MXFP4Tensor, available_backends, mxfp4_matmul, quantize_mxfp4, quartet_linear, unpack_mask

pytest.importorskip("transformers")
from lightning_quartet import export, plot, recipes

PUBLIC = ("quartet_kernels", "lightning_quartet", *(f"lightning_quartet.{n}" for n in ("export", "recipes")))
MODULES_WITHOUT_ALL = (metrics, plot)
"""Documented in docs/api.md; their public names are the ones without an underscore that are defined there."""

CONFIG = QuartetConfig()


def documented() -> set[tuple[str, str]]:
    """(name, exception) of every entry of a ``Raises:`` section of a public function, class or method."""
    objects: dict[str, object] = {}
    for name in PUBLIC:
        module = importlib.import_module(name)
        objects |= {member: getattr(module, member) for member in module.__all__}
    for module in MODULES_WITHOUT_ALL:
        objects |= {
            name: member
            for name, member in vars(module).items()
            if not name.startswith("_") and getattr(member, "__module__", None) == module.__name__
        }
    found = set()
    for name, member in objects.items():
        members = {name: member}
        if inspect.isclass(member):
            members |= {f"{name}.{own}": value for own, value in vars(member).items() if not own.startswith("_")}
        for full, value in members.items():
            text = inspect.getdoc(getattr(value, "__func__", value)) or ""
            section = re.search(r"^Raises:\n((?:(?: .*)?\n?)+)", text, re.MULTILINE)
            if section is not None and not isinstance(value, (str, int, float, tuple, dict)):
                found |= {(full, error) for error in re.findall(r"^    (\w+):", section.group(1), re.MULTILINE)}
    return found


class Model(LightningModule):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*(layers or (nn.Linear(32, 32),)))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Elsewhere(Model):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)


def fit(*callbacks: object, model: LightningModule | None = None, **options: object) -> None:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", max_steps=1, callbacks=list(callbacks), **quiet, **options)
    trainer.fit(model or Model(), DataLoader(torch.randn(4, 32)))


def converted(*layers: nn.Module) -> nn.Module:
    model = nn.Sequential(*(layers or (nn.Linear(32, 32),)))
    convert_to_quartet(model)
    return model


def pruned() -> nn.Module:
    model = converted()
    nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def parametrised() -> nn.Module:
    model = converted()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


@pytest.fixture(autouse=True)
def _place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # with it GPU backends run on the CPU


def packed(rows: int = 32, columns: int = 32, device: str = "cpu") -> MXFP4Tensor:
    codes = torch.zeros(rows, columns // 2, dtype=torch.uint8, device=device)
    return MXFP4Tensor(codes, codes.new_zeros(rows, columns // 32))


def linear(
    x: object = (4, 32), weight: object = (32, 32), bias: object = None, dtype: torch.dtype = torch.float32, **options
) -> torch.Tensor:
    tensors = [torch.ones(t, dtype=dtype) if isinstance(t, tuple) else t for t in (x, weight, bias)]
    return quartet_linear(*tensors, **{"config": CONFIG, **options})


def twice() -> None:
    x = torch.randn(4, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(converted()(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()


def traced() -> None:
    torch.jit.trace(converted(), torch.randn(4, 32), check_trace=False)(torch.randn(4, 32)).sum().backward()


def llama(**options: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    convert_to_quartet(model, config=QuartetConfig(**options))
    return model


def exported(model: nn.Module | None = None, format: str = "quartet", out: str = "out", **options: object) -> str:
    export.export_quartet(llama() if model is None else model, format, out, progress=False, **options)
    return out


def damaged() -> None:
    (file,) = Path(exported()).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    export.from_pretrained_quartet("out")


def unreadable() -> None:
    Path("metrics.csv").write_text("step,train_loss\nzero,one\n")
    plot.read_curves(Path())


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def plot_into_a_file() -> None:
    write("metrics.csv", "step,train_loss\n0,1.0\n1,0.5\n")
    plot.plot_run(".", write("occupied", ""))


def plot_without_matplotlib() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        plot.plot_run(".")


def export_without_gguf() -> None:
    find = importlib.util.find_spec
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
        exported(format="gguf")


def text_data(**options: object) -> None:
    options = {"path": write("text.txt", "# a\n\nfew words\n"), "cache_dir": "cache", **options}
    data = recipes.TextDataModule(**options)
    data.prepare_data()
    data.setup("fit")


def labelled(lines: str = '{"text": "a", "label": 0}\n', **options: object) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save("tokenizer.json")
    options = {"path": write("lines.jsonl", lines), "tokenizer": "tokenizer.json", **options}
    recipes.LabelledTextDataModule(**options).setup("fit")


LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 300}

CASES: dict[tuple[str, str], list[Callable[[], object]]] = {
    # quartet_kernels
    ("QuartetConfig", "ValueError"): [
        lambda: QuartetConfig(hadamard_group_size=48),
        lambda: QuartetConfig(seed=-1),
        lambda: QuartetConfig(randomize_backward=1),
    ],
    ("QuartetConfig.from_recipe", "ValueError"): [
        lambda: QuartetConfig.from_recipe("quartett"),
        lambda: QuartetConfig.from_recipe("quartet", sed=1),
    ],
    ("QuartetConfig.from_dict", "ValueError"): [
        lambda: QuartetConfig.from_dict({"sed": 1}),
        lambda: QuartetConfig.from_dict({"statistic": "max"}),
    ],
    ("MXFP4Tensor", "TypeError"): [lambda: MXFP4Tensor(torch.zeros(1, 16), torch.zeros(1, 1, dtype=torch.uint8))],
    ("MXFP4Tensor", "ValueError"): [
        lambda: MXFP4Tensor(packed().codes, packed(columns=64).scales),
        lambda: MXFP4Tensor(packed().codes, packed(device="meta").scales),
        lambda: MXFP4Tensor(packed().codes, packed().scales, float("nan")),
    ],
    ("unpack_mask", "TypeError"): [lambda: unpack_mask(torch.zeros(1))],
    ("available_backends", "RuntimeError"): [
        lambda: available_backends("nowhere"),
        lambda: available_backends("cuda:99"),
    ],
    ("quantize_mxfp4", "TypeError"): [
        lambda: quantize_mxfp4(torch.zeros(2, 32, dtype=torch.int32)),
        lambda: quantize_mxfp4(torch.zeros(2, 32).to_sparse()),
        lambda: quantize_mxfp4(torch.zeros(2, 32), config="quartet"),
    ],
    ("quantize_mxfp4", "ValueError"): [
        lambda: quantize_mxfp4(torch.zeros(2, 33)),
        lambda: quantize_mxfp4(torch.zeros(2, 32), mode="sideways"),
        lambda: quantize_mxfp4(torch.zeros(2, 32), rounding="up"),
        lambda: quantize_mxfp4(torch.zeros(2, 32), signs=torch.ones(32)),
        lambda: quantize_mxfp4(torch.zeros(2, 32), mode="backward", signs=torch.ones(31)),
        lambda: quantize_mxfp4(torch.zeros(2, 32), backend="nothing"),
    ],
    ("quantize_mxfp4", "RuntimeError"): [lambda: quantize_mxfp4(torch.zeros(2, 32), backend="fp8")],
    ("mxfp4_matmul", "TypeError"): [lambda: mxfp4_matmul(packed(), packed(), out_dtype=torch.int32)],
    ("mxfp4_matmul", "ValueError"): [
        lambda: mxfp4_matmul(packed(), packed(columns=64)),
        lambda: mxfp4_matmul(packed(), packed(device="meta")),
        lambda: mxfp4_matmul(packed(), packed(), bias=torch.zeros(31)),
    ],
    ("mxfp4_matmul", "RuntimeError"): [lambda: mxfp4_matmul(packed(), packed(), backend="fp8")],
    ("quartet_linear", "TypeError"): [
        lambda: linear(dtype=torch.int32),
        lambda: linear(config="quartet"),
        lambda: linear(seed=3.0),
        lambda: linear(weight=torch.ones(32, 32, dtype=torch.float64)),
        lambda: linear(x=torch.ones(4, 32).to_sparse()),
        lambda: linear(x=torch.nested.nested_tensor([torch.ones(2, 32), torch.ones(1, 32)], layout=torch.jagged)),
    ],
    ("quartet_linear", "ValueError"): [
        lambda: linear(x=(4, 64)),
        lambda: linear(x=()),
        lambda: linear(weight=(32,)),
        lambda: linear(weight=(33, 32)),
        lambda: linear(x=(4, 48), weight=(32, 48)),
        lambda: linear(bias=(31,)),
        lambda: linear(weight=torch.ones(32, 32, device="meta")),
        lambda: linear(master=torch.ones(32, 32)),
        lambda: linear(x=torch.ones(4, 32, requires_grad=True), seed=torch.zeros(2, dtype=torch.int64)),
        lambda: linear(x=torch.ones(4, 32, requires_grad=True), seed=2**32),
        lambda: linear(signs=(torch.ones(31), torch.ones(32))),
        lambda: linear(signs=(torch.ones(32),)),
        lambda: linear(weight=quantize_mxfp4(torch.ones(32, 32), mode="backward")),
    ],
    ("quartet_linear", "RuntimeError"): [
        lambda: linear(config=QuartetConfig(backend="fp8")),
        lambda: torch.func.grad(lambda x: linear(x=x).sum())(torch.ones(4, 32)),
        lambda: torch.func.vmap(lambda x: linear(x=x))(torch.ones(2, 4, 32)),
        twice,
        traced,
    ],
    # Conversion
    ("QuartetLinear", "TypeError"): [lambda: QuartetLinear(32, 32, config="quartet")],
    ("QuartetLinear", "ValueError"): [lambda: QuartetLinear(48, 32), lambda: QuartetLinear(32, 48)],
    ("convert_to_quartet", "TypeError"): [
        lambda: convert_to_quartet("model"),
        lambda: convert_to_quartet(nn.Linear(32, 32), config=1),
        lambda: convert_to_quartet(nn.Linear(32, 32), modules_to_not_convert="head"),
    ],
    ("convert_to_quartet", "ValueError"): [
        lambda: convert_to_quartet(nn.Linear(32, 32), config="quartett"),
        lambda: convert_to_quartet(nn.Linear(32, 32), modules_to_not_convert=["head"]),
        lambda: convert_to_quartet(nn.Linear(32, 33)),
    ],
    ("revert_from_quartet", "TypeError"): [lambda: revert_from_quartet(None)],
    ("revert_from_quartet", "ValueError"): [lambda: revert_from_quartet(parametrised())],
    ("pack_quartet", "TypeError"): [lambda: pack_quartet(None)],
    ("pack_quartet", "ValueError"): [lambda: pack_quartet(nn.Linear(32, 32)), lambda: pack_quartet(pruned())],
    ("set_quartet_step", "TypeError"): [
        lambda: set_quartet_step(None, 0),
        lambda: set_quartet_step(converted(), 0.5),
    ],
    ("set_quartet_step", "ValueError"): [
        lambda: set_quartet_step(converted(), -1),
        lambda: set_quartet_step(converted(), 0, 2**16),
        lambda: set_quartet_step(nn.Linear(32, 32), 0),
    ],
    # Lightning
    ("QuartetQAT", "TypeError"): [lambda: QuartetQAT(3), lambda: QuartetQAT(modules_to_not_convert="head")],
    ("QuartetQAT", "ValueError"): [
        lambda: QuartetQAT("quartett"),
        lambda: QuartetQAT(start_step=-1),
        lambda: QuartetQAT(start_step=2, end_step=2),
        lambda: fit(QuartetQAT(modules_to_not_convert=["head"])),
        lambda: fit(QuartetQAT(), model=Model(nn.Linear(32, 5))),
    ],
    ("QuartetQAT", "RuntimeError"): [lambda: fit(QuartetQAT(QuartetConfig(backend="fp8")))],
    ("QuartetQAT", "MisconfigurationException"): [
        lambda: QuartetQAT().setup(SimpleNamespace(), Model(), "fit"),
        lambda: fit(QuartetQAT(), type("Second", (QuartetQAT,), {})()),
        lambda: fit(QuartetQAT(), plugins=[QuartetPrecision("32-true", "bf16_backward")]),
        lambda: fit(QuartetQAT(QuartetConfig(store_master_weights=False)), WeightAveraging()),
        lambda: fit(QuartetQAT(), model=Elsewhere()),
    ],
    ("QuartetPrecision", "TypeError"): [lambda: QuartetPrecision("32-true", 3)],
    ("QuartetPrecision", "ValueError"): [
        lambda: QuartetPrecision("8-true"),
        lambda: QuartetPrecision("32-true", "quartett"),
        lambda: fit(plugins=[QuartetPrecision("32-true", modules_to_not_convert=["head"])]),
        lambda: fit(plugins=[QuartetPrecision("32-true")], model=Model(nn.Linear(32, 5))),
    ],
    ("QuartetMonitor", "ValueError"): [lambda: QuartetMonitor(every_n_steps=0), lambda: QuartetMonitor(rows=0)],
    ("QuartetMonitor", "TypeError"): [lambda: QuartetMonitor(layers="net")],
    ("QuartetMonitor", "MisconfigurationException"): [
        lambda: fit(QuartetMonitor()),
        lambda: fit(QuartetQAT(), QuartetMonitor(layers=["head"])),
    ],
    ("QuartetFSDP", "ValueError"): [lambda: QuartetFSDP(reduce_dtype="float16")],
    ("QuartetFSDP", "MisconfigurationException"): [lambda: find_blocks(Model(), ["Bloc"])],
    # Metrics
    ("projection_sums", "TypeError"): [lambda: metrics.projection_sums(torch.zeros(2, 32, dtype=torch.int32))],
    ("projection_sums", "ValueError"): [
        lambda: metrics.projection_sums(torch.zeros(2, 33)),
        lambda: metrics.projection_sums(torch.zeros(2, 32), mode="sideways"),
        lambda: metrics.projection_sums(torch.zeros(2, 32), signs=torch.ones(32)),
    ],
    ("alignment_sums", "ValueError"): [lambda: metrics.alignment_sums(torch.zeros(2), torch.zeros(3))],
    ("QuantizationSNR", "ValueError"): [lambda: metrics.QuantizationSNR(mode="sideways")],
    ("ScaleExponentHistogram", "ValueError"): [lambda: metrics.ScaleExponentHistogram(mode="sideways")],
    ("FP8SpanMisses", "ValueError"): [lambda: metrics.FP8SpanMisses(mode="sideways")],
    ("GradientAlignment.update", "ValueError"): [
        lambda: metrics.GradientAlignment().update(torch.zeros(2), torch.zeros(3))
    ],
    # Export and pictures
    ("export_quartet", "TypeError"): [lambda: exported(nn.Linear(32, 32))],
    ("export_quartet", "ValueError"): [
        lambda: exported(format="onnx"),
        lambda: exported(dtype=torch.int8),
        lambda: exported(format="gguf"),
        lambda: exported(activations="abs_max"),
    ],
    ("export_quartet", "FileExistsError"): [lambda: exported(out=os.path.dirname(write("there/file", "")))],
    ("export_quartet", "OSError"): [lambda: exported(out=write("file", "") + "/out")],
    ("export_quartet", "ImportError"): [export_without_gguf],
    ("from_pretrained_quartet", "FileNotFoundError"): [lambda: export.from_pretrained_quartet("nowhere")],
    ("from_pretrained_quartet", "ValueError"): [damaged],
    ("plot_run", "ValueError"): [lambda: plot.plot_run("."), lambda: plot.plot_run("nowhere")],
    ("plot_run", "OSError"): [plot_into_a_file],
    ("plot_run", "ModuleNotFoundError"): [plot_without_matplotlib],
    ("read_curves", "ValueError"): [unreadable],
    # Recipes
    ("CausalLM", "ValueError"): [
        lambda: recipes.CausalLM(),
        lambda: recipes.CausalLM(LLAMA, "folder"),
        lambda: recipes.CausalLM({**LLAMA, "hiden_size": 32}),
    ],
    ("CausalLM", "FileNotFoundError"): [lambda: recipes.CausalLM(pretrained="nowhere")],
    ("TextClassifier", "ValueError"): [
        lambda: recipes.TextClassifier("nowhere", 1),
        lambda: recipes.ImageClassifier("nowhere", 1),
    ],
    ("TextClassifier", "FileNotFoundError"): [lambda: recipes.TextClassifier("nowhere", 2)],
    ("TextDataModule", "ValueError"): [
        lambda: text_data(batch_size=0),
        lambda: text_data(validation_documents=5),
        lambda: text_data(tokenizer=write("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}')),
    ],
    ("TextDataModule", "FileNotFoundError"): [lambda: text_data(path="nowhere"), lambda: text_data(tokenizer="no")],
    ("LabelledTextDataModule", "ValueError"): [lambda: labelled(held_out=0.7), lambda: labelled('{"text": 3}\n')],
    ("LabelledTextDataModule", "FileNotFoundError"): [
        lambda: labelled(path="nowhere"),
        lambda: labelled(tokenizer="nowhere"),
    ],
    ("FashionMNISTDataModule", "ValueError"): [lambda: recipes.FashionMNISTDataModule(".", batch_size=0)],
    ("FashionMNISTDataModule", "FileNotFoundError"): [lambda: recipes.FashionMNISTDataModule("nowhere").setup("fit")],
}


def test_every_documented_error_has_a_case():
    assert documented() == set(CASES)
    assert all(CASES.values())


@pytest.mark.parametrize(
    ("error", "call"),
    [
        pytest.param(error, call, id=f"{name}-{error}-{number}")
        for (name, error), calls in CASES.items()
        for number, call in enumerate(calls)
    ],
)
def test_documented_error(error: str, call: Callable[[], object]):
    with pytest.raises(Exception) as caught:
        call()
    assert error in {kind.__name__ for kind in type(caught.value).__mro__}, repr(caught.value)
    assert str(caught.value).strip()
    ours = ("/lightning_quartet/", "/quartet_kernels/")  # not Python's own, of arguments that are no more
    assert any(part in str(frame.path) for frame in caught.traceback for part in ours), repr(caught.value)
