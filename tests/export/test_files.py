"""What is written where and when, and hostile folders: refused with one sentence, nothing run, nothing left behind."""

import json
import os
import pickle
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from models import bert, llama, tokenizer, tokens
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lightning_quartet import QuartetConfig, convert_to_quartet, pack_quartet
from lightning_quartet.export import FORMATS, export_quartet, from_pretrained_quartet
from lightning_quartet.export.files import INDEX, MARKER, WEIGHTS
from lightning_quartet.export.gguf import FILE

CONFIG = QuartetConfig()


# Writing -------------------------------------------------------------------------------------------------------------


def test_a_failed_export_leaves_nothing_and_keeps_what_was_there(tmp_path, monkeypatch):
    out = tmp_path / "out"
    export_quartet(llama(CONFIG), "quartet", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr("lightning_quartet.export.api.write_card", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        export_quartet(llama(CONFIG), "dense", out, overwrite=True)
    with pytest.raises(RuntimeError, match="disk full"):
        export_quartet(llama(CONFIG), "dense", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def fail(*args):
    raise RuntimeError("disk full")


def test_nothing_is_overwritten_unasked_and_only_an_export_is_when_asked(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export_quartet(llama(CONFIG), "quartet", out)  # an empty folder may be filled
    with pytest.raises(FileExistsError, match="--overwrite"):
        export_quartet(llama(CONFIG), "dense", out)
    (out / "stale").touch()
    export_quartet(llama(CONFIG), "dense", out, overwrite=True)
    assert not (out / "stale").exists()
    assert json.loads((out / MARKER).read_text())["format"] == "dense"

    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="no earlier export"):
        export_quartet(llama(CONFIG), "dense", precious, overwrite=True)
    assert [path.name for path in precious.iterdir()] == ["thesis.tex"]


def test_what_appears_during_the_export_is_kept(tmp_path, monkeypatch):
    def appear(*args):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").touch()

    monkeypatch.setattr("lightning_quartet.export.api.write_card", appear)
    with pytest.raises(FileExistsError, match="appeared during the export"):
        export_quartet(llama(CONFIG), "quartet", tmp_path / "out")
    with pytest.raises(FileExistsError):
        export_quartet(llama(CONFIG), "quartet", tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.tex"]
    (tmp_path / "out" / "thesis.tex").unlink()
    (tmp_path / "out").rmdir()
    with pytest.raises(FileExistsError, match="no earlier export"):
        export_quartet(llama(CONFIG), "quartet", tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.tex"]


def test_an_interruption_between_the_renames_puts_the_old_export_back(tmp_path, monkeypatch):
    out = export_quartet(llama(CONFIG), "quartet", tmp_path / "out")
    rename = Path.rename

    def interrupted(path, target):
        if Path(target) == out and (path / "README.md").exists() and "dense" in (path / MARKER).read_text():
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_quartet(llama(CONFIG), "dense", out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert torch.equal(from_pretrained_quartet(out)(tokens()).logits, llama(CONFIG)(tokens()).logits)


def test_a_failed_export_leaves_no_parents_and_the_working_directory_alone(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("lightning_quartet.export.api.write_card", fail)
        with pytest.raises(RuntimeError, match="disk full"):
            export_quartet(llama(CONFIG), "quartet", tmp_path / "x" / "y" / "z")
    assert not list(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    for out in (".", "..", ""):
        with pytest.raises(FileExistsError, match="working directory"):
            export_quartet(llama(CONFIG), "quartet", out, overwrite=True)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_os_error(tmp_path, monkeypatch):
    def full(*args, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("lightning_quartet.export.files.save_file", full)
    with pytest.raises(OSError, match="could not be written .*No space left"):
        export_quartet(llama(CONFIG), "quartet", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_generation_config_that_contradicts_itself_is_refused_before_weights_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_quartet.export.folder.write_tensors", fail)
    model = llama(CONFIG)
    model.generation_config.temperature = 0.5
    with pytest.raises(ValueError, match="generation_config is not valid") as caught:
        export_quartet(model, "quartet", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_folders_have_the_usual_permissions(tmp_path):
    out = export_quartet(llama(CONFIG), "quartet", tmp_path / "a" / "b")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~mask
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o666 & ~mask}


def test_shards_and_their_index(tmp_path):
    model = llama(CONFIG)
    whole = export_quartet(model, "dense", tmp_path / "a", dtype=torch.float32)
    parts = export_quartet(model, "dense", tmp_path / "b", dtype=torch.float32, shard_bytes=100_000)
    index = json.loads((parts / INDEX).read_text())
    files = {path.name: load_file(path) for path in parts.glob("*.safetensors")}
    assert len(files) == 4
    assert not (parts / WEIGHTS).exists()
    assert {key: name for name, tensors in files.items() for key in tensors} == index["weight_map"]
    expected = load_file(whole / WEIGHTS)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    for name, tensors in files.items():
        assert sum(t.nbytes for t in tensors.values()) <= 100_000
        for key, tensor in tensors.items():
            assert torch.equal(tensor, expected.pop(key)), name
    assert not expected
    loaded = type(model).from_pretrained(parts)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_the_model_may_lie_inside_another_module(tmp_path):
    holder = nn.Module()
    holder.inner = llama(CONFIG)
    export_quartet(holder, "quartet", tmp_path / "a")
    assert "model.layers.0.mlp.up_proj.weight_codes" in load_file(tmp_path / "a" / WEIGHTS)
    holder.other = bert(CONFIG)
    with pytest.raises(ValueError, match="2 Hugging Face models"):
        export_quartet(holder, "quartet", tmp_path / "b")


def test_what_is_no_model_to_export(tmp_path):
    import peft

    out = tmp_path / "a"
    ia3 = {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    for model, kind, message in (
        (nn.Linear(32, 32), TypeError, "no Hugging Face model"),
        ([], TypeError, "not list"),
        (llama(), ValueError, "no QuartetLinear layers; convert it"),
        (peft.get_peft_model(llama(CONFIG), peft.LoraConfig(target_modules="all-linear")), ValueError, "LoRA"),
        (adapted(peft.IA3Config(**ia3)), ValueError, "adapters of peft"),
        (adapted(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)), ValueError, "adapters of peft"),
        (adapted(peft.IA3Config(**ia3)).base_model.model, ValueError, r"has model.*base_layer.*, which a new one"),
        (adapted(peft.LNTuningConfig(target_modules=["norm"])).base_model.model, ValueError, "which a new one has"),
    ):
        with pytest.raises(kind, match=message):
            export_quartet(model, "dense", out)
    tied = llama(tied=True)
    convert_to_quartet(tied, modules_to_not_convert=[])
    with pytest.raises(ValueError, match="lm_head is in MXFP4 and its weight is tied"):
        export_quartet(tied, "dense", out)
    mixed = llama(CONFIG)
    mixed.model.layers[0].mlp.up_proj.quartet_config = QuartetConfig(statistic="std")
    with pytest.raises(ValueError, match="2 different configs"):
        export_quartet(mixed, "dense", out)
    model = llama(CONFIG)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj holds NaN or infinity"):
        export_quartet(model, "quartet", out)
    model = llama(CONFIG, bias=True)
    model.model.norm.weight.data[3] = 1e30
    with pytest.raises(ValueError, match=r"norm.weight holds NaN or infinity as torch.float16"):
        export_quartet(model, "dense", out, dtype=torch.float16)
    model.model.layers[0].self_attn.q_proj.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"q_proj.bias holds NaN or infinity"):
        export_quartet(model, "quartet", out)
    model = llama(CONFIG)
    model.model.layers[1].mlp.up_proj.quartet_enabled = False
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj computes in high precision"):
        export_quartet(model, "quartet", out)
    model = llama(CONFIG)
    torch.nn.utils.prune.l1_unstructured(model.lm_head, "weight", 0.3)
    with pytest.raises(ValueError, match="lm_head.weight"):
        export_quartet(model, "quartet", out)
    assert not list(tmp_path.iterdir())


def adapted(config) -> nn.Module:
    import peft

    return peft.get_peft_model(llama(CONFIG), config)


def test_a_sharded_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(nn.Parameter, "_local_tensor", None, raising=False)
    with pytest.raises(ValueError, match="a consolidated checkpoint"):
        export_quartet(llama(CONFIG), "quartet", tmp_path / "a")


def test_wrappers_and_shared_weights_come_out_as_the_class_names_them(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    compiled, wrapped, twice, tied, stored = (llama(CONFIG) for _ in range(5))
    compiled.model.layers[1] = torch.compile(compiled.model.layers[1], backend="eager")
    wrapped.model.layers[0] = checkpoint_wrapper(wrapped.model.layers[0])
    twice.model.layers[1] = twice.model.layers[0]
    tied.lm_head.weight = tied.model.embed_tokens.weight
    stored.lm_head.weight = nn.Parameter(stored.model.embed_tokens.weight.data)
    for i, model in enumerate((compiled, wrapped, twice, tied, stored)):
        for format in ("quartet", "dense"):
            out = export_quartet(model, format, tmp_path / f"{format}{i}", dtype=torch.float32)
            assert load_file(out / WEIGHTS).keys() == expected_keys(format)
        loaded = from_pretrained_quartet(tmp_path / f"quartet{i}")
        # One layer in two places would share one place of the cache.
        assert torch.equal(loaded(tokens(), use_cache=False).logits, model(tokens(), use_cache=False).logits)


def expected_keys(format: str) -> set[str]:
    model = llama(CONFIG)
    if format == "quartet":
        pack_quartet(model)
    return {key for key in model.state_dict() if not key.endswith("_extra_state")}  # config.json says it


def test_a_subclass_is_written_as_the_class_that_transformers_has(tmp_path):
    class Mine(LlamaForCausalLM):
        pass

    model = llama(CONFIG)
    model.__class__ = Mine
    out = export_quartet(model, "quartet", tmp_path / "a")
    assert type(from_pretrained_quartet(out)) is LlamaForCausalLM
    model.score = nn.Linear(64, 2)
    with pytest.raises(ValueError, match="has score.bias, which a new one has not"):
        export_quartet(model, "quartet", tmp_path / "b")


def test_arguments_are_checked(tmp_path):
    model = llama(CONFIG)
    for options, message in (
        ({"format": "onnx"}, "no format 'onnx'; choose one of 'quartet', 'fp_quant'"),
        ({"format": "dense", "dtype": torch.int8}, "dtype is torch.int8"),
        ({"format": "dense", "activations": "abs_max"}, "cannot do activations='abs_max'"),
    ):
        with pytest.raises(ValueError, match=message):
            export_quartet(model, out=tmp_path / "a", **options)
    with pytest.raises(FileNotFoundError, match="no directory"):
        export_quartet(model, "dense", tmp_path / "a", source=tmp_path / "nowhere")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install gguf"):
        export_quartet(llama(QuartetConfig(transform_init="identity")), "gguf", tmp_path / "a")


def test_progress_is_shown_on_a_terminal_only(tmp_path, monkeypatch, capsys):
    export_quartet(llama(CONFIG), "quartet", tmp_path / "a")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    export_quartet(llama(CONFIG), "quartet", tmp_path / "b")
    out, err = capsys.readouterr()
    assert out == ""
    assert "Writing quartet" in err
    export_quartet(llama(CONFIG), "quartet", tmp_path / "c", progress=False)
    assert capsys.readouterr() == ("", "")


def test_tokenizer_files_are_copied_and_code_is_not(tmp_path):
    source = tmp_path / "source"
    tokenizer(source)
    (source / "modeling_evil.py").touch()
    (source / "pytorch_model.bin").touch()
    model = llama(CONFIG)
    model.config.auto_map = {"AutoModel": "modeling_evil.Evil"}
    out = export_quartet(model, "quartet", tmp_path / "a", source=source)
    names = {path.name for path in out.iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "config.json", "README.md"}
    assert not names & {"modeling_evil.py", "pytorch_model.bin"}
    assert "auto_map" not in (out / "config.json").read_text()

    values = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**values, "auto_map": {"AutoTokenizer": ["evil.T"]}}))
    for name in ("spm.model", "source.spm", "bpe.codes", "normalizer.json"):
        (source / name).write_text("{}")
    (source / "preprocessor_config.json").write_text('{"size": 8, "auto_map": {"AutoImageProcessor": "evil.P"}}')
    out = export_quartet(model, "quartet", tmp_path / "b", source=source)
    assert json.loads((out / "tokenizer_config.json").read_text()) == values
    assert json.loads((out / "preprocessor_config.json").read_text()) == {"size": 8}
    assert {path.name for path in out.iterdir()} >= {"spm.model", "source.spm", "bpe.codes", "normalizer.json"}


def test_paths_of_this_machine_are_not_written_and_an_export_is_its_own_source(tmp_path):
    source = tmp_path / "source"
    tokenizer(source)
    model = llama(CONFIG)
    model.config.name_or_path = str(source)
    out = export_quartet(model, "quartet", tmp_path / "a")
    assert str(tmp_path) not in (out / "config.json").read_text()
    shutil.rmtree(source)
    again = export_quartet(from_pretrained_quartet(out), "dense", tmp_path / "b")
    assert (again / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    values = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**values, "_name_or_path": "/etc"}))
    assert from_pretrained_quartet(out).config.name_or_path == str(out)


def test_links_out_of_the_tokenizers_folder_are_not_followed(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    blobs = tmp_path / "models--a--b" / "blobs"
    tokenizer(snapshot)
    blobs.mkdir()
    (snapshot / "tokenizer.json").rename(blobs / "456")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/456")  # Hugging Face's cache
    out = export_quartet(llama(CONFIG), "quartet", tmp_path / "a", source=snapshot)
    assert (out / "tokenizer.json").read_bytes() == (blobs / "456").read_bytes()
    assert not (out / "tokenizer.json").is_symlink()
    (tmp_path / "secret").touch()
    (snapshot / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"vocab.txt is a link out of its folder"):
        export_quartet(llama(CONFIG), "quartet", tmp_path / "b", source=snapshot)


# Reading: hostile folders --------------------------------------------------------------------------------------------


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture(params=["quartet", "fp_quant"])
def folder(request, tmp_path) -> Path:
    return export_quartet(llama(CONFIG), request.param, tmp_path / "out", dtype=torch.float32)


LAYER = "model.layers.0.mlp.up_proj"


def change(folder: Path, changes) -> None:
    tensors = load_file(folder / WEIGHTS)
    if not (folder / WEIGHTS).exists():
        raise AssertionError
    changes(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def codes(folder: Path) -> str:
    return (
        f"{LAYER}.weight_codes"
        if "quartet" in json.loads((folder / MARKER).read_text())["format"]
        else (f"{LAYER}.qweight")
    )


def scales(folder: Path) -> str:
    return codes(folder).replace("weight_codes", "weight_scales").replace("qweight", "scales")


def refused(folder: Path, match: str, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=match) as caught:
        from_pretrained_quartet(folder)
    assert "\n" not in str(caught.value)


def test_the_folder_loads_before_it_is_damaged(folder):
    assert torch.equal(from_pretrained_quartet(folder)(tokens()).logits, llama(CONFIG)(tokens()).logits)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_weights(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    refused(folder, f"{re.escape(WEIGHTS)} is truncated or no safetensors")


def test_wrong_dtypes(folder):
    change(folder, lambda t: t.update({codes(folder): t[codes(folder)].to(torch.int8)}))
    refused(folder, f"{codes(folder)} has dtype I8; it must be U8")


def test_wrong_dtype_of_a_norm(folder):
    change(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int32)}))
    refused(folder, "model.norm.weight has dtype I32")


def test_a_norm_that_is_not_finite_or_has_a_dtype_of_its_own(folder):
    norm = torch.ones(64)
    change(folder, lambda t: t.update({"model.norm.weight": norm.double()}))
    refused(folder, "hold F64 beside F32")
    norm[3] = torch.nan
    change(folder, lambda t: t.update({"model.norm.weight": norm}))
    refused(folder, "model.norm.weight holds NaN or infinity")


@pytest.mark.parametrize("name", ["codes", "scales", "norm"])
def test_wrong_shapes(folder, name):
    key = {"codes": codes(folder), "scales": scales(folder), "norm": "model.norm.weight"}[name]
    change(folder, lambda t: t.update({key: t[key][:-1].clone()}))
    refused(folder, f"{key} has shape .*config.json says")


def test_missing_and_unexpected_tensors(folder):
    key = scales(folder)
    saved = load_file(folder / WEIGHTS)[key]
    change(folder, lambda t: t.pop(key))
    refused(folder, f"{key} is missing")
    change(folder, lambda t: t.update({key: saved, "extra.weight": torch.ones(2)}))
    refused(folder, "extra.weight, which LlamaForCausalLM does not have")


@pytest.mark.parametrize(("byte", "message"), [(255, "NaN scales"), (253, "scales beyond 252")])
def test_scales_of_no_finite_weight(folder, byte, message):
    change(folder, lambda t: t[scales(folder)].view(-1)[7:8].fill_(byte))
    refused(folder, f"{scales(folder)} has {message}")


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..\\x.safetensors",
        "x.bin",
        "",
        3,
        None,
        f"{'x' * 300}.safetensors",
    ],
)
def test_an_index_that_leaves_the_folder(folder, name):
    (folder.parent / "outside.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    keys = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(keys, name)}))
    refused(folder, "only safetensors in the folder itself are read")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_a_map(folder, content):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(content)
    refused(folder, "has no weight_map")


def test_an_index_that_lies(folder):
    keys = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys([*keys, "zzz"], "a.safetensors")}))
    refused(folder, "differ about 'zzz'")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(keys, "b.safetensors")}))
    refused(folder, "b.safetensors is missing", FileNotFoundError)


def test_pickles_are_neither_read_nor_run(folder):
    bomb = folder.parent / "exploded"
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(bomb)))
    refused(folder, "pytorch_model.bin, a pickle, which could run code")
    (folder / "pytorch_model.bin").rename(folder / WEIGHTS)
    refused(folder, "no safetensors")
    assert not bomb.exists()


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '"a"', "[" * 100_000])
def test_broken_json(folder, content):
    (folder / "config.json").write_text(content)
    refused(folder, "config.json (is not valid JSON|holds a JSON)")


def edit(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    "architecture", ["os", "Trainer", "AutoModel.from_pretrained", "__class__", "NoSuchModel", 3, None]
)
def test_an_architecture_that_is_no_model(folder, architecture):
    edit(folder, architectures=[architecture])
    refused(folder, "which transformers does not have")


def test_code_that_config_json_names_is_not_fetched(folder, monkeypatch):
    edit(
        folder,
        auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"},
        attn_implementation="someone/kernel",
        _attn_implementation="someone/kernel",
    )
    (folder / "modeling_evil.py").write_text(f"open({str(folder.parent / 'exploded')!r}, 'w')")
    loaded = from_pretrained_quartet(folder)
    assert loaded.config._attn_implementation == "sdpa"
    assert not (folder.parent / "exploded").exists()


def test_sizes_that_do_not_fit_the_files(folder):
    edit(folder, intermediate_size=2**40 + 32, head_dim=None)  # 64 TiB of weights, if anybody made them
    refused(folder, "has shape .*config.json says")
    edit(folder, intermediate_size="big")
    refused(folder, "config.json is no valid LlamaForCausalLM")
    edit(folder, intermediate_size=100)
    refused(folder, "The sizes of model.layers.0.mlp.down_proj do not fit")


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 2000), ("num_labels", 2 * 10**6)])
def test_numbers_that_would_fill_the_memory(folder, key, value):
    edit(folder, **{key: value})
    refused(folder, f"has {key}={value}, and for [0-9]+ tensors at most")
    edit(folder, **{key: 2}, text_config={key: value})
    refused(folder, f"has {key}={value}")


def test_lists_of_depths_and_tables_that_would_fill_the_memory(folder):
    edit(folder, depths=[300000, 2])
    refused(folder, "has num_layers=300002, and for [0-9]+ tensors at most")
    model = GPTJForCausalLM(GPTJConfig(vocab_size=64, n_embd=64, n_layer=1, n_head=2, rotary_dim=32, n_positions=64))
    convert_to_quartet(model)
    out = export_quartet(model, "quartet", folder.parent / "gptj", progress=False)
    from_pretrained_quartet(out)
    edit(out, n_positions=10**7)
    refused(out, "asks for a table of [0-9]+ bytes that is in no file")


def test_lists_that_are_no_depths_are_read(folder):
    for key in ("embed_dim_per_stage", "moe_layers", "mlp_only_layers", "stage_out_channels"):
        edit(folder, **{key: [100000, 200000]})
        from_pretrained_quartet(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["TimmWrapperForImageClassification"]},
        {"model_type": "timm_wrapper"},
        {"text_config": {"backbone_config": {"model_type": "timm_backbone"}}},
        {"text_config": [{"use_timm_backbone": True}]},
        {"vision_config": {"model_type": "gemma3n_vision", "architecture": "hf-hub:someone/evil"}},
        {"architectures": ["DetrForObjectDetection"], "model_type": "detr", "backbone": "hf-hub:someone/evil"},
    ],
    ids=str,
)
def test_models_that_another_package_would_make_are_refused(folder, changes):
    edit(folder, **changes)
    refused(folder, "another package would make that model from names in the file")


def test_a_users_own_architecture_is_exported_to_what_can_hold_it(tmp_path):
    class Mine(PreTrainedModel):
        config_class = LlamaConfig

        def __init__(self, config):
            super().__init__(config)
            self.up = nn.Linear(64, 64)
            self.post_init()

    model = Mine(LlamaConfig(hidden_size=64))
    convert_to_quartet(model)
    with pytest.raises(ValueError, match="only classes of transformers, not Mine; choose another format"):
        export_quartet(model, "quartet", tmp_path / "a")
    out = export_quartet(model, "dense", tmp_path / "b")
    assert "# Mine is a class of whoever trained the model" in (out / "README.md").read_text()


def test_cards_say_what_is_true_of_this_model(tmp_path):
    def card(model, format):
        return (export_quartet(model, format, tmp_path / "a", overwrite=True) / "README.md").read_text()

    grid, computed = "lie on no MXFP4 grid", "buffers that are not saved"
    assert grid in card(llama(CONFIG), "dense")
    assert grid not in card(llama(QuartetConfig(transform_init="identity")), "dense")
    assert computed not in card(llama(CONFIG), "quartet")
    assert computed in card(llama(CONFIG).bfloat16(), "quartet")


def test_a_quantization_config_that_is_none_of_ours(folder):
    for value, message in (
        (None, "quant_method None"),
        ({"quant_method": "gptq"}, "quant_method 'gptq'"),
        ([], "quant_method None"),
    ):
        edit(folder, quantization_config=value)
        refused(folder, message)


def test_hostile_options_of_our_own_format(tmp_path):
    folder = export_quartet(llama(CONFIG), "quartet", tmp_path / "out")
    good = json.loads((folder / "config.json").read_text())["quantization_config"]
    for changes, message in (
        ({"modules": None}, "without `config` and `modules`"),
        ({"modules": []}, "4-bit weights of None"),
        ({"modules": ["model.norm"]}, "'model.norm', which is no linear layer"),
        ({"modules": ["../../etc"]}, "which is no linear layer"),
        ({"config": {"statistic": "evil"}}, "statistic is 'evil'"),
        ({"config": {"evil": 1}}, "no option 'evil'"),
    ):
        edit(folder, quantization_config={**good, **changes})
        refused(folder, message)


def test_hostile_options_of_fp_quant(tmp_path):
    folder = export_quartet(llama(CONFIG), "fp_quant", tmp_path / "out", dtype=torch.float32)
    good = json.loads((folder / "config.json").read_text())["quantization_config"]
    for changes, message in (
        ({"forward_dtype": "nvfp4"}, "only packed mxfp4 is read"),
        ({"pseudoquantization": True}, "only packed mxfp4 is read"),
        ({"forward_method": "magic"}, "forward_method is 'magic'"),
        ({"hadamard_group_size": 48}, "hadamard_group_size is 48"),
        ({"forward_method": "abs_max"}, "weight_global_scale is not 3.0"),
        ({"transform_init": "gsr"}, "is not the rotation 'gsr'"),
    ):
        edit(folder, quantization_config={**good, **changes})
        refused(folder, message)
    edit(folder, quantization_config=good)
    for key, value in (("weight_global_scale", torch.tensor([torch.nan])), ("act_global_scale", torch.ones(2))):
        tensors = load_file(folder / WEIGHTS)
        save_file(tensors | {f"{LAYER}.{key}": value}, folder / WEIGHTS)
        refused(folder, f"{key} is not 1.0")
        save_file(tensors, folder / WEIGHTS)


def test_a_folder_without_files(tmp_path):
    refused(tmp_path, "has no config.json", FileNotFoundError)
    refused(tmp_path / "nowhere", "has no config.json", FileNotFoundError)
    folder = export_quartet(llama(CONFIG), "quartet", tmp_path / "a")
    (folder / WEIGHTS).unlink()
    refused(folder, "has neither", FileNotFoundError)


def test_gguf_refuses_other_models(tmp_path):
    identity = QuartetConfig(transform_init="identity")
    with pytest.raises(ValueError, match="this is 'bert'"):
        export_quartet(bert(identity), "gguf", tmp_path / "a")
    gelu = llama(identity)
    gelu.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="this one has 'gelu'"):
        export_quartet(gelu, "gguf", tmp_path / "a")
    tokenizer(tmp_path / "source")
    for pre_tokenizer in ({"type": "ByteLevel"}, {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]}):
        broken = json.dumps({"model": {"type": "BPE"}, "pre_tokenizer": pre_tokenizer})
        (tmp_path / "source" / "tokenizer.json").write_text(broken)
        with pytest.raises(ValueError, match=r"tokenizer.json has no vocab"):
            export_quartet(llama(identity), "gguf", tmp_path / "a", source=tmp_path / "source")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert FILE in {path.name for path in export_quartet(llama(identity), "gguf", tmp_path / "a").iterdir()}
    assert set(FORMATS) >= {"gguf"}
