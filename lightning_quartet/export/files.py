"""Writing folders so that they are there whole or not at all, and reading them without trusting them."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MARKER = "quartet_export.json"
"""A file that every export has: what it was made from; only a folder with it is ever overwritten."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_JSON_BYTES = 64 * 2**20
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "*spm*.model",
    "*.spm",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "entity_vocab.json",
    "normalizer.json",
    "tekken.json",
    "vocab-*.json",
    "chat_template.j*",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


@contextmanager
def new_folder(out: str | os.PathLike, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out`` if the block succeeds and vanishes if it does not.

    Raises:
        FileExistsError: If ``out`` exists and is not to be, or must not be, replaced.
    """
    target = Path(os.path.realpath(out))
    if target in (Path.cwd(), *Path.cwd().parents):
        raise FileExistsError(f"{os.fspath(out)!r} is or holds the working directory; name a directory inside it.")
    if not _is_free(target):
        if not overwrite:
            raise FileExistsError(f"{out} exists; choose another directory, or overwrite it (--overwrite).")
        _check_export(target)
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            yield folder
            mask = os.umask(0)
            os.umask(mask)
            for path in (folder, *folder.iterdir()):  # temporary folders and safetensors are private to the user
                path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
            _put(folder, target, overwrite)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except BaseException:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def _is_free(target: Path) -> bool:
    return not target.exists() or (target.is_dir() and not any(target.iterdir()))


def _check_export(folder: Path) -> None:
    if not (folder / MARKER).is_file():
        raise FileExistsError(f"{folder} is no earlier export (it has no {MARKER}), so it is not overwritten.")


def _put(folder: Path, target: Path, overwrite: bool) -> None:
    """Rename a finished folder; what was there is deleted only when the new one is in its place."""
    if not overwrite or _is_free(target):
        try:
            folder.rename(target)  # refused by the system unless there is nothing, or an empty directory
        except OSError:
            if _is_free(target):
                raise
            raise FileExistsError(f"{target} appeared during the export; choose another directory.") from None
        return
    _check_export(target)
    backup = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old = backup / target.name
    try:
        target.rename(old)
        folder.rename(target)
    except BaseException:
        if old.exists() and _is_free(target):
            old.rename(target)
        if not _is_free(target):  # the old export, or that of another process
            shutil.rmtree(backup, ignore_errors=True)
        raise
    shutil.rmtree(backup, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write tensors as they come: one file, or shards of at most ``shard_bytes`` with an index.

    Raises:
        OSError: If the disk is full, say.
    """
    header = {"format": "pt", **(metadata or {})}
    shards: list[Path] = []
    names: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    storages: set[int] = set()  # safetensors refuses tensors that share one
    total = size = 0

    def flush() -> None:
        shards.append(folder / f"shard-{len(shards)}.safetensors")
        names.append(list(shard))
        try:
            save_file(shard, shards[-1], metadata=header)
        except SafetensorError as error:  # which is no OSError
            raise OSError(f"The weights could not be written to {folder.parent} ({_reason(error)}).") from None
        shard.clear()
        storages.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        shard[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        storages.add(shard[name].untyped_storage().data_ptr())
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        shards[0].rename(folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, (path, keys) in enumerate(zip(shards, names, strict=True), 1):
        final = f"model-{number:05}-of-{len(shards):05}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(keys, final)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def copy_tokenizer(source: Path | None, folder: Path) -> None:
    """Copy the files (data only, never code) of a model folder's tokenizer and image processor.

    Raises:
        ValueError: If a file is a link out of the folder, or one that ends in _config.json is not valid.
    """
    if source is None:
        return
    for path in sorted({path for pattern in _TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()}):
        if not _inside(path, source):
            raise ValueError(f"{path} is a link out of its folder; replace it by the file itself.")
        if path.name.endswith("_config.json"):
            values = read_json(path)
            values.pop("auto_map", None)  # it names code, which is not copied
            write_json(folder / path.name, values)
        else:
            shutil.copyfile(path, folder / path.name)


def _inside(path: Path, folder: Path) -> bool:
    """Whether a file of a folder lies there, or in the blobs beside the snapshots of Hugging Face's cache."""
    real, root = path.resolve(), folder.resolve()
    return real.is_relative_to(root) or (root.parent.name == "snapshots" and real.parent == root.parents[1] / "blobs")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; pass a folder that holds a model.")
    if path.stat().st_size > _JSON_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a JSON file of a model has far fewer.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({type(error).__name__}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; it must hold an object.")
    return content


class TensorFiles:
    """The safetensors files of a model folder: names, dtypes and shapes from their headers, tensors on request.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, is no safetensors, or the index names what it must not.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}  # key -> open file
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path, expected in self._listed(folder).items():
            file = _open(path)
            keys = set(file.keys())
            if expected is not None and keys != expected:
                name = min(keys ^ expected)
                raise ValueError(f"{INDEX} and {path.name} differ about {name!r}; the folder is damaged.")
            for key in keys:
                part = file.get_slice(key)
                self._files[key] = file
                self.shapes[key], self.dtypes[key] = tuple(part.get_shape()), part.get_dtype()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def read(self, key: str) -> Tensor:
        return self._files[key].get_tensor(key)

    @staticmethod
    def _listed(folder: Path) -> dict[Path, set[str] | None]:
        if (folder / WEIGHTS).is_file():
            return {folder / WEIGHTS: None}
        if not (folder / INDEX).is_file():
            pickles = sorted(p.name for s in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for p in folder.glob(s))
            if pickles:
                raise ValueError(f"{folder} holds {pickles[0]}, a pickle, which could run code; only safetensors load.")
            raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}; pass a folder that holds a model.")
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX} has no weight_map; the folder is damaged.")
        files: dict[Path, set[str] | None] = {}
        for key, name in weight_map.items():
            if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,200}\.safetensors", name, re.ASCII):
                shown = f"{name!r}"[:100]
                raise ValueError(f"{INDEX} names the file {shown}; only safetensors in the folder itself are read.")
            keys = files.setdefault(folder / name, set())
            assert keys is not None
            keys.add(key)
        return files


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the folder is not complete.")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({_reason(error)}).") from None


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
