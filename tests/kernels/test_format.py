"""Configuration, the MXFP4 format, rotations and random bits."""

import dataclasses

import numpy as np
import pytest
import torch

from quartet_kernels import (
    RECIPES,
    MXFP4Tensor,
    QuartetConfig,
    available_backends,
    backends,
    quantize_mxfp4,
    unpack_mask,
)
from quartet_kernels import mxfp4 as fmt
from quartet_kernels.backends import load_backend, select_backend
from quartet_kernels.philox import draw_signs, make_seed, philox4x32, random_bytes
from quartet_kernels.rotation import _matrix, rotation_matrix


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("forward_method", "fp8"),
        ("statistic", "mean"),
        ("scale_rule", "ceil"),
        ("hadamard_group_size", 16),
        ("hadamard_group_size", 32.0),
        ("transform_init", "dct"),
        ("backward_dtype", "fp4"),
        ("backward_rounding", "up"),
        ("randomize_backward", 1),
        ("store_master_weights", None),
        ("accumulation", "slow"),
        ("backend", "cutlass"),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", True),
    ],
)
def test_an_unknown_value_is_refused_with_the_allowed_ones(option, value):
    with pytest.raises(ValueError, match=rf"QuartetConfig\.{option} is .*; choose"):
        QuartetConfig(**{option: value})


def test_config_is_frozen_keyword_only_and_round_trips():
    config = QuartetConfig(hadamard_group_size=64, seed=7)
    assert QuartetConfig.from_dict(config.to_dict()) == config
    assert str(config) == "QuartetConfig(hadamard_group_size=64, seed=7)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        QuartetConfig("quest")  # type: ignore[misc]
    with pytest.raises(ValueError, match="no option 'group'"):
        QuartetConfig.from_dict({"group": 32})


def test_recipes():
    assert QuartetConfig.from_recipe("quartet") == QuartetConfig()
    assert QuartetConfig.from_recipe("quartet_stochastic").backward_rounding == "stochastic"
    assert QuartetConfig.from_recipe("bf16_backward").backward_dtype == "bf16"
    assert QuartetConfig.from_recipe("mxfp8_backward").backward_dtype == "mxfp8"
    parity = QuartetConfig.from_recipe("fp_quant", seed=3)
    assert (parity.statistic, parity.scale_rule, parity.backward_rounding, parity.seed) == (
        "std",
        "floor",
        "nearest",
        3,
    )
    for name in RECIPES:
        QuartetConfig.from_recipe(name)
    with pytest.raises(ValueError, match="no recipe 'nvfp4'"):
        QuartetConfig.from_recipe("nvfp4")


def test_codes_and_masks_pack_and_unpack():
    codes = torch.randint(0, 16, (3, 64), dtype=torch.uint8)
    packed = fmt.pack_codes(codes)
    assert packed.shape == (3, 32)
    assert packed[0, 0] == codes[0, 0] + 16 * codes[0, 1]  # low nibble first
    assert torch.equal(fmt.unpack_codes(packed), codes)
    keep = torch.rand(3, 64) < 0.5
    words = fmt.pack_mask(keep)
    assert words.dtype == torch.int32
    assert words.shape == (3, 2)
    assert (words[1, 1].item() >> 5) & 1 == int(keep[1, 37])
    assert torch.equal(unpack_mask(words), keep)
    with pytest.raises(TypeError, match="int32"):
        unpack_mask(words.to(torch.int64))


def test_every_byte_decodes_to_the_value_the_specification_gives():
    scales = torch.arange(256, dtype=torch.uint8)
    expected = torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 127)
    values = fmt.scale_values(scales, torch.float64)
    assert torch.equal(values[:255], expected[:255])
    assert values[255].isnan()
    codes = fmt.pack_codes(torch.arange(16, dtype=torch.uint8).repeat(2)[None])
    tensor = MXFP4Tensor(codes, torch.tensor([[128]], dtype=torch.uint8), 4 / 3)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    assert torch.equal(tensor.dequantize(torch.float64), torch.cat((grid, -grid)).repeat(2)[None] * 2 * (4 / 3))
    assert tensor.shape == (1, 32)
    assert tensor.nbytes == 17


def test_codes_and_scales_that_do_not_belong_together_are_refused():
    codes, scales = torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="do not go with"):
        MXFP4Tensor(codes, scales[:, :1])
    with pytest.raises(TypeError, match="uint8"):
        MXFP4Tensor(codes.int(), scales)
    with pytest.raises(ValueError, match="are on"):
        MXFP4Tensor(codes, scales.to("meta"))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_rotations_are_orthogonal_and_gsr_is_sorted_by_sign_changes(group):
    device = torch.device("cpu")
    matrix = rotation_matrix("hadamard", group, device)
    assert torch.equal(matrix @ matrix.T, group * torch.eye(group))
    sorted_ = rotation_matrix("gsr", group, device)
    assert torch.equal(sorted_ @ sorted_.T, group * torch.eye(group))
    changes = (sorted_[1:] != sorted_[:-1]).sum(0)
    assert torch.equal(changes, torch.arange(group))  # a Walsh matrix: column i changes its sign i times
    assert rotation_matrix("identity", group, device) is None


def test_a_rotation_first_made_in_inference_mode_can_be_saved_for_backward():
    _matrix.cache_clear()
    with torch.inference_mode():
        matrix = rotation_matrix("hadamard", 32, torch.device("cpu"))
    assert not matrix.is_inference()


def test_philox_known_answers():
    # Known-answer vectors of Random123 for philox4x32-10.
    for counter, key, expected in (
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        for kind in (torch.tensor, int):
            words = philox4x32(tuple(map(kind, counter)), tuple(map(kind, key)))
            assert tuple(int(w) for w in words) == expected


def test_streams_of_layers_steps_micro_batches_ranks_and_roles_share_no_bits():
    base = {"seed": 5, "layer": 1, "step": 2, "rank": 0, "micro_batch": 0}
    changes = [{}, {"seed": 6}, {"layer": 2}, {"step": 3}, {"rank": 1}, {"micro_batch": 1}]
    draws = []
    for change in changes:
        words = torch.tensor(make_seed(**{**base, **change}))
        draws += [random_bytes(words, role, 0, 16) for role in (2, 3, 4, 5)]
    for i, first in enumerate(draws):
        for second in draws[:i]:
            assert (first == second).float().mean() < 0.05  # 1/256 by chance
    bytes_ = torch.stack(draws).flatten().numpy()
    counts = np.bincount(bytes_, minlength=256)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 350  # chi-squared, 255 degrees of freedom


def test_random_bytes_do_not_depend_on_where_a_block_of_rows_starts():
    words = torch.tensor(make_seed(9, 4, 3))
    whole = random_bytes(words, 2, 0, 12)
    assert torch.equal(torch.cat((random_bytes(words, 2, 0, 5), random_bytes(words, 2, 5, 7))), whole)


def test_signs_are_the_bits_of_word_zero():
    words = torch.tensor(make_seed(3, 1, 7, 2, 5))
    word = philox4x32((torch.tensor(0), 7, 2 << 16 | 5, 1), (3, 1))[0].item()
    assert draw_signs(words, 1).tolist() == [1 - 2 * ((word >> i) & 1) for i in range(32)]


@pytest.mark.parametrize(("name", "value"), [("step", 2**32), ("layer", -1), ("rank", 2**16), ("micro_batch", 2**16)])
def test_numbers_too_large_for_a_random_stream_are_refused(name, value):
    with pytest.raises(ValueError, match=f"The {name} of a random stream is {value}"):
        make_seed(0, **{name: value})


def test_backends_say_why_they_can_run_or_not():
    reasons = available_backends("cpu")
    assert reasons["reference"] == "can run; chosen for cpu"
    assert set(reasons) == {"reference", "triton", "fp8", "bf16", "native"}
    with pytest.raises(ValueError, match="no backend 'nothing'"):
        load_backend("nothing")
    with pytest.raises(RuntimeError, match="no float64"):
        select_backend("triton", torch.device("cpu"), torch.float64)


def test_a_backend_that_cannot_run_says_what_it_needs(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert available_backends("cpu")["fp8"].startswith("cannot run: it needs a CUDA GPU with FP8")
    with pytest.raises(RuntimeError, match="Backend 'fp8' cannot run on cpu: it needs .*; use backend='auto'"):
        quantize_mxfp4(torch.zeros(1, 32), backend="fp8")


def test_an_environment_variable_overrides_auto(monkeypatch):
    monkeypatch.setenv("QUARTET_BACKEND", "triton")
    assert select_backend("auto", torch.device("cpu"), torch.float32).name == "triton"
    assert select_backend("reference", torch.device("cpu"), torch.float32).name == "reference"


@pytest.mark.parametrize(
    ("capability", "architecture", "triton", "chosen"),
    [
        ((7, 5), None, (3, 8), "reference"),
        ((8, 0), None, (3, 8), "bf16"),
        ((8, 6), None, (3, 8), "bf16"),
        ((8, 9), None, (3, 6), "fp8"),
        ((9, 0), None, (3, 6), "fp8"),
        ((10, 0), None, (3, 6), "native"),
        ((10, 3), None, (3, 6), "native"),
        ((12, 0), None, (3, 6), "native"),
        ((12, 1), None, (3, 8), "bf16"),
        ((12, 1), None, (3, 9), "native"),
        (None, "gfx950", (3, 9), "native"),
        (None, "gfx950", (3, 8), "triton"),
        (None, "gfx942", (3, 9), "triton"),
    ],
)
def test_each_gpu_gets_its_fastest_backend(capability, architecture, triton, chosen, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(backends, "_capability", lambda device: capability)
    monkeypatch.setattr(backends, "_amd_architecture", lambda device: architecture)
    monkeypatch.setattr(backends, "_triton_version", lambda: triton)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    backends._automatic.cache_clear()
    try:
        reasons = available_backends("cuda")
    finally:
        backends._automatic.cache_clear()
    assert [name for name, reason in reasons.items() if "chosen" in reason] == [chosen]
    assert all(reason.startswith("can run") or " needs " in reason for reason in reasons.values())


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64)])
def test_a_tensor_without_rows_quantises_to_one_without_rows(shape, mode):
    packed, mask = quantize_mxfp4(torch.empty(shape), mode=mode, return_mask=True)
    assert (packed.shape, mask.shape) == (shape, (*shape[:-1], 2))
