"""from_pretrained_quartet: read packed models back, trusting nothing in the folder."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quartet.convert import convert
from lightning_quartet.export.files import MARKER, TensorFiles, read_json
from lightning_quartet.export.fp_quant import ABS_MAX_BYTES, ABS_MAX_GLOBAL_SCALE, hadamard_matrix
from lightning_quartet.linear import QuartetLinear
from quartet_kernels import QuartetConfig
from quartet_kernels.mxfp4 import NAN_SCALE

_MAX_SCALE = 252
_DEPTHS = re.compile(  # lists: of each stage, how many layers it has
    r"depths?|(num_|n_)?(blocks?|layers?)(_sizes|_repeats)?|\w*(blocks|layers)_per_stage|stage_num_blocks"
    r"|num_block_repeats|n_attn_blocks"
)
_LAYERS = re.compile(r"(num_|n_)?(hidden_|encoder_|decoder_)?layers?")
_MOST_SHARED_LAYERS, _MOST_LABELS, _MOST_BUFFER_BYTES = 1000, 10**6, 2**28
_FLOATS = ("F32", "BF16", "F16", "F64")


def from_pretrained_quartet(
    folder: str | os.PathLike, *, device: torch.device | str = "cpu", backend: str = "auto"
) -> Any:
    """Load a model that was exported as ``"quartet"`` or ``"fp_quant"``, weights equal bit for bit.

    Layers come back packed (frozen): run it, or train adapters on it. An ``fp_quant`` folder with master weights
    comes back with those, to be trained further. Only safetensors and JSON are read; no code is run.

    Args:
        folder: A local folder.
        device: Where to put the model.
        backend: Of the layers' config.

    Returns:
        The Hugging Face model, in evaluation mode.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the folder is damaged, hostile, or of another format; nothing is returned half-loaded.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    quantization = values.pop("quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in ("quartet", "fp_quant"):
        raise ValueError(
            f"{folder} has quant_method {method!r}; from_pretrained_quartet reads 'quartet' and 'fp_quant' (other "
            "formats load in the libraries that they are for)."
        )
    files = TensorFiles(folder)
    if method == "quartet":
        options, modules = _own_config(quantization)
    else:
        options, modules = _fp_quant_config(quantization, files, folder)
    try:
        config = QuartetConfig.from_dict({**options, "backend": backend})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    model = build_model(values, folder, len(files.shapes), "meta")
    _convert(model, folder, config, modules)
    reader = _Reader(files, config, method)
    wanted = _check(model, files, reader)
    # The files hold all of this model and nothing else; only now is memory of its size taken.
    buffers = _buffers(model, values, folder)
    state = {key: reader.read(key) for key in wanted}
    for key in {name for name, _ in model.named_parameters()} & state.keys():  # buffers may be infinite: masks
        if not state[key].isfinite().all():
            raise ValueError(f"{reader.name(key)} holds NaN or infinity; the model diverged or the file is damaged.")
    model.load_state_dict(state, strict=False, assign=True)
    for name, buffer in buffers.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer)
    model.tie_weights()
    read_generation_config(model, folder)
    model.config.name_or_path = str(folder)  # as transformers does: where export_quartet finds the tokenizer
    return model.to(device).eval()


def _own_config(quantization: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    config, modules = quantization.get("config"), quantization.get("modules")
    if not isinstance(config, dict) or not isinstance(modules, list) or not all(isinstance(m, str) for m in modules):
        raise ValueError("config.json has a quantization_config without `config` and `modules`; export again.")
    return {**config, "store_master_weights": False}, modules


def _fp_quant_config(
    quantization: dict[str, Any], files: TensorFiles, folder: Path
) -> tuple[dict[str, Any], list[str]]:
    if quantization.get("forward_dtype") != "mxfp4" or quantization.get("pseudoquantization"):
        raise ValueError(
            f"{folder} has forward_dtype={quantization.get('forward_dtype')!r}, pseudoquantization="
            f"{quantization.get('pseudoquantization')!r}; only packed mxfp4 is read."
        )
    # Our own exports say beside it what else they were trained with; others were made by fp-quant's kernels.
    config: dict[str, Any] = {"statistic": "std", "scale_rule": "floor"}
    if (folder / MARKER).is_file():
        saved = read_json(folder / MARKER).get("config")
        config |= saved if isinstance(saved, dict) else {}
    config |= {
        "forward_method": quantization.get("forward_method"),
        "transform_init": quantization.get("transform_init", "hadamard"),
        "hadamard_group_size": quantization.get("hadamard_group_size") or 32,
    }
    packed = [key.removesuffix(".qweight") for key in files if key.endswith(".qweight")]
    config["store_master_weights"] = not packed
    if packed:
        return config, packed
    kept = quantization.get("modules_to_not_convert") or []
    masters = [
        key.removesuffix(".weight")
        for key in files
        if key.endswith(".weight") and f"{key.removesuffix('weight')}forward_hadamard_matrix" in files
    ]
    return config, [name for name in masters if not any(name.endswith(str(other)) for other in kept)]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json without its quantization_config."""
    values = read_json(folder / "config.json")
    values.pop("quantization_config", None)
    return values


def read_generation_config(model: Any, folder: Path) -> None:
    """Give a model the generation_config.json of a folder, where there is one.

    Raises:
        ValueError: If it is not valid.
    """
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not model.can_generate() or not path.is_file():
        return
    values = read_json(path)
    try:
        model.generation_config = GenerationConfig.from_dict(values)
    except Exception as error:
        raise ValueError(f"{path} is no valid generation config ({type(error).__name__}).") from None


def build_model(values: dict[str, Any], folder: Path, tensors: int, device: str = "cpu") -> Any:
    """The model that a config.json describes, its weights not initialised; only classes of transformers are made.

    Args:
        values: Of config.json.
        folder: Where it lies, for errors.
        tensors: How many there are to fill the model with; one with more layers is not made.
        device: Where to make it.

    Raises:
        ValueError: If transformers has no such model, or the config is not valid or not of these tensors.
    """
    import transformers
    from transformers.initialization import no_init_weights

    _check_sizes(values, folder, tensors)
    architectures = values.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    kind = None
    if isinstance(name, str) and re.fullmatch(r"[A-Z][A-Za-z0-9_]*", name):
        kind = getattr(transformers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise ValueError(f"config.json names the architecture {name!r}, which transformers does not have.")
    model_class: Any = kind

    def attempt(make: Callable[[], Any]) -> Any:
        try:
            return make()
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            raise ValueError(f"{folder / 'config.json'} is no valid {name}: {type(error).__name__} {reason}") from None

    _check_origin(values, folder)
    config = attempt(lambda: model_class.config_class.from_dict(_plain(values)))
    _check_origin(attempt(config.to_dict), folder)  # with the parts that the class of configs adds
    with torch.device(device), no_init_weights():
        return attempt(lambda: model_class(config))


def _check_origin(values: dict[str, Any], folder: Path) -> None:
    """Refuse classes of transformers that let another package make a model, or fetch one, by names in the file."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    for key, value in values.items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                _check_origin(part, folder)
        asked = key in ("use_timm_backbone", "use_pretrained_backbone") and value
        if key == "model_type":
            asked = "timm" in f"{value} {MODEL_MAPPING_NAMES.get(str(value))}".lower()
        if asked or (key == "architectures" and "timm" in str(value).lower()):
            raise ValueError(
                f"{folder / 'config.json'} has {key}={value!r}: another package would make that model from names in "
                "the file, which may be files or addresses; only models of transformers itself are read."
            )


def _check_sizes(values: dict[str, Any], folder: Path, tensors: int) -> None:
    """Refuse numbers for which modules or labels would fill the memory."""
    for key, value in values.items():
        if isinstance(value, dict):
            _check_sizes(value, folder, tensors)
        if isinstance(value, list) and _DEPTHS.fullmatch(str(key)):
            value = sum(number for number in value if isinstance(number, int))
            key = "num_layers"
        # More layers than tensors share theirs.
        layers = max(tensors, _MOST_SHARED_LAYERS)
        most = layers if _LAYERS.fullmatch(str(key)) else _MOST_LABELS if key == "num_labels" else None
        if most is not None and isinstance(value, int) and value > most:
            raise ValueError(
                f"{folder / 'config.json'} has {key}={value}, and for {tensors} tensors at most {most} is read."
            )


def _convert(model: Any, folder: Path, config: QuartetConfig, modules: list[str]) -> None:
    """Give exactly these layers their class."""
    wanted = set(modules)
    linears = {key for key, module in model.named_modules(remove_duplicate=False) if isinstance(module, nn.Linear)}
    if not wanted or not wanted <= linears:
        odd = min(wanted - linears, default=None)
        raise ValueError(f"{folder} has 4-bit weights of {odd!r}, which is no linear layer of {type(model).__name__}.")
    convert(model, config, [], lambda _, key: key in wanted)
    done = {key for key, module in model.named_modules(remove_duplicate=False) if isinstance(module, QuartetLinear)}
    if done != wanted:
        raise ValueError(f"The sizes of {min(wanted - done)} do not fit {config}.")


def _plain(values: Any) -> Any:
    """A config without what could name code to fetch and run (``auto_map``, attention kernels) or another folder."""
    if isinstance(values, dict):
        left_out = ("auto_map", "_name_or_path")
        return {k: _plain(v) for k, v in values.items() if k not in left_out and "implementation" not in str(k)}
    return [_plain(value) for value in values] if isinstance(values, list) else values


class _Reader:
    """Tensors of our state dict from those in the files."""

    def __init__(self, files: TensorFiles, config: QuartetConfig, method: str) -> None:
        self.files, self.config, self.method = files, config, method
        self.abs_max = method == "fp_quant" and config.forward_method == "abs_max"
        self.used: set[str] = set()

    def name(self, key: str) -> str:
        """The name in the files of one of our keys."""
        if self.method == "fp_quant":
            key = re.sub(r"\.weight_codes$", ".qweight", re.sub(r"\.weight_scales$", ".scales", key))
        return key

    def check(self, key: str, shape: tuple[int, ...], packed: bool) -> None:
        name = self.name(key)
        self.used.add(name)
        if name not in self.files:
            raise ValueError(f"{name} is missing from the safetensors files; the folder is not complete.")
        dtype, allowed = self.files.dtypes[name], ("U8",) if packed else _FLOATS
        if dtype not in allowed:
            raise ValueError(f"{name} has dtype {dtype}; it must be {' or '.join(allowed)}.")
        if self.files.shapes[name] != shape:
            raise ValueError(f"{name} has shape {list(self.files.shapes[name])}; config.json says {list(shape)}.")

    def read(self, key: str) -> Tensor:
        tensor = self.files.read(self.name(key))
        if key.endswith(".weight_scales"):
            limit = _MAX_SCALE + (ABS_MAX_BYTES if self.abs_max else 0)
            if (tensor == NAN_SCALE).any():
                raise ValueError(f"{self.name(key)} has NaN scales; the model diverged or the file is damaged.")
            if (tensor > limit).any() or (self.abs_max and ((tensor > 0) & (tensor <= ABS_MAX_BYTES)).any()):
                raise ValueError(f"{self.name(key)} has scales beyond {limit}, which no finite weight gives.")
            if self.abs_max:
                tensor = torch.where(tensor == 0, 0, tensor - ABS_MAX_BYTES)
        return tensor

    def check_fp_quant(self, layers: list[str]) -> None:
        """Global scales and rotation are those that our layers compute with."""
        scale = ABS_MAX_GLOBAL_SCALE if self.abs_max else 1.0
        for layer in layers:
            for name in ("weight_global_scale", "act_global_scale"):
                key = f"{layer}.{name}"
                if key in self.files and (self.files.shapes[key] != (1,) or self.files.read(key).item() != scale):
                    raise ValueError(f"{key} is not {scale}, the scale of {self.config.forward_method!r}.")
                self.used.add(key)
            key = f"{layer}.forward_hadamard_matrix"
            if key in self.files:
                size = self.config.hadamard_group_size
                expected = hadamard_matrix(self.config, torch.float32)
                matrix = self.files.read(key) if self.files.shapes[key] == (size, size) else None
                if matrix is None or not torch.allclose(matrix.float(), expected, rtol=0, atol=2**-9):
                    raise ValueError(f"{key} is not the rotation {self.config.transform_init!r} of {size}.")
            self.used |= {key, f"{layer}.backward_hadamard_matrix"}


def _check(model: Any, files: TensorFiles, reader: _Reader) -> list[str]:
    """Compare names, dtypes and shapes of all tensors with the headers of the files; the keys to read."""
    layers = [name for name, module in model.named_modules() if isinstance(module, QuartetLinear)]
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = model.state_dict()
    described = {f"{layer}._extra_state" for layer in layers}  # by config.json
    wanted = [key for key in state if key not in described and (key not in tied or reader.name(key) in files)]
    for key in wanted:
        packed = key.endswith((".weight_codes", ".weight_scales")) and key.rpartition(".")[0] in layers
        if state[key].is_floating_point() or packed:
            reader.check(key, tuple(state[key].shape), packed)
        elif reader.name(key) not in files:
            raise ValueError(f"{key} is missing from the safetensors files; the folder is not complete.")
    floats = {files.dtypes[reader.name(key)] for key in wanted if state[key].is_floating_point()}
    if "F64" in floats and len(floats) > 1:
        raise ValueError(f"The files hold F64 beside {min(floats - {'F64'})}; save all floats in one dtype.")
    if reader.method == "fp_quant":
        reader.check_fp_quant(layers)
    unexpected = set(files) - reader.used - set(wanted) - set(tied)
    if unexpected:
        raise ValueError(f"The files hold {min(unexpected)}, which {type(model).__name__} does not have.")
    return wanted


def _buffers(model: Any, values: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Buffers that are not saved (rotary frequencies): a second model, without initial weights, computes them."""
    saved = set(model.state_dict())
    missing = [name for name, _ in model.named_buffers() if name not in saved]
    if not missing:
        return {}
    size = max(model.get_buffer(name).nbytes for name in missing)
    if size > _MOST_BUFFER_BYTES:
        raise ValueError(f"{folder / 'config.json'} asks for a table of {size} bytes that is in no file.")
    twin = build_model(values, folder, len(saved))
    return {name: twin.get_buffer(name).clone() for name in missing}
