"""The metrics: known values, merging, edges."""

import copy
import math

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_quartet.metrics import (
    ClipFraction,
    FP8SpanMisses,
    GradientAlignment,
    QuantizationSNR,
    ScaleExponentHistogram,
    projection_sums,
)
from quartet_kernels import QuartetConfig, quantize_mxfp4, unpack_mask
from quartet_kernels.reference import rotate
from quartet_kernels.rotation import rotation_matrix

IDENTITY = QuartetConfig(transform_init="identity")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_snr_of_a_normal_distribution_is_that_of_the_format() -> None:
    # Mean squared error, averaged over one octave of standard deviations: 1.25e-2 of the variance.
    errors = []
    for i in range(8):
        snr = QuantizationSNR()
        snr.update(normal(256, 256, seed=i) * 2 ** (i / 8))
        errors.append(10 ** (-snr.compute().item() / 10))
    assert sum(errors) / len(errors) == pytest.approx(1.25e-2, rel=0.02)


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("config", [QuartetConfig(), IDENTITY, QuartetConfig(hadamard_group_size=128)])
def test_snr_is_that_of_the_dequantised_tensor(mode: str, config: QuartetConfig) -> None:
    x = normal(16, 128)
    packed = quantize_mxfp4(x, config=config, mode=mode)
    if mode == "forward":
        matrix = rotation_matrix(config.transform_init, config.hadamard_group_size, x.device)
    else:
        matrix = rotation_matrix("hadamard", 32, x.device)
    back = rotate(packed.dequantize(), None if matrix is None else matrix.t())  # in x's own basis
    want = 10 * math.log10(x.square().sum() / (x - back).square().sum())
    snr = QuantizationSNR(config, mode)
    snr.update(x)
    assert snr.compute().item() == pytest.approx(want, abs=1e-3)


def test_metrics_in_a_collection_give_the_numbers_that_they_give_alone() -> None:
    """A collection merges metrics whose states are equal after the first update, as they are after zeros."""
    configs = {"quartet": QuartetConfig(), "fp_quant": QuartetConfig.from_recipe("fp_quant")}
    metrics = {f"snr_{name}": QuantizationSNR(config) for name, config in configs.items()}
    metrics |= {"backward": QuantizationSNR(mode="backward"), "clip": ClipFraction(), "misses": FP8SpanMisses()}
    collection = MetricCollection(copy.deepcopy(metrics))
    for x in (torch.zeros(8, 64), normal(8, 64)):
        collection.update(x)
        for metric in metrics.values():
            metric.update(x)
    found = collection.compute()
    assert found == {name: metric.compute() for name, metric in metrics.items()}
    assert found["clip"] > found["misses"] == 0
    assert len({value.item() for value in found.values()}) == 5


def test_values_on_the_grid_lose_nothing() -> None:
    snr = QuantizationSNR(IDENTITY)
    snr.update(torch.tensor([0.5, 1.0, -1.5, 2.0] * 16)[None])
    assert snr.compute() == math.inf


def test_clip_fraction_counts_what_the_mask_drops() -> None:
    x = normal(64, 256)
    _, mask = quantize_mxfp4(x, return_mask=True)
    dropped = (~unpack_mask(mask)).sum().item()
    assert dropped > 0
    clip = ClipFraction()
    clip.update(x)
    assert clip.compute().item() == dropped / x.numel()
    never = ClipFraction(QuartetConfig(forward_method="abs_max"))
    never.update(x)
    assert never.compute() == 0


@pytest.mark.parametrize(("exponent", "missed"), [(-24, 0.0), (-27, 0.0), (-40, 0.5)])
def test_span_misses_count_what_is_far_below_the_largest_of_a_row(exponent: int, missed: float) -> None:
    x = torch.ones(4, 64)
    x[:, 32:] *= 2.0**exponent
    metric = FP8SpanMisses(IDENTITY)
    metric.update(x)
    assert metric.compute() == missed
    other_rows = FP8SpanMisses(IDENTITY)
    other_rows.update(torch.cat((x[:, :32], x[:, 32:])))  # each row has its own scale
    other_rows.update(torch.full((1, 64), math.nan))
    other_rows.update(torch.zeros(1, 64))
    assert other_rows.compute() == 0


def test_histogram_counts_scale_bytes_dead_and_broken_groups() -> None:
    x = torch.ones(4, 64)
    x[0, :32] = 0
    x[1, 40] = math.nan
    histogram = ScaleExponentHistogram(IDENTITY)
    histogram.update(x)
    counts = histogram.compute()
    assert counts.dtype == torch.int64
    assert counts.sum() == 8
    assert counts[0] == 1
    assert counts[255] == 1
    shifted = ScaleExponentHistogram(IDENTITY)
    shifted.update(x * 2.0**20)
    assert torch.equal(shifted.compute()[21:255], counts[1:235])  # 20 octaves up


def test_gradient_alignment_of_known_vectors() -> None:
    metric = GradientAlignment()
    metric.update(torch.tensor([3.0, 0.0]), torch.tensor([2.0, 2.0]))
    assert metric.compute()["cosine"].item() == pytest.approx(math.sqrt(0.5))
    assert metric.compute()["projection"].item() == pytest.approx(0.75)
    with pytest.raises(ValueError, match=r"shape \(2,\) and the exact one \(3,\)"):
        metric.update(torch.ones(2), torch.ones(3))


@pytest.mark.parametrize("make", [QuantizationSNR, ClipFraction, ScaleExponentHistogram, FP8SpanMisses])
def test_merging_is_exact(make: type) -> None:
    x = normal(96, 128)
    whole, parts = make(), [make() for _ in range(3)]
    whole.update(x)
    for metric, rows in zip(parts, x.split([32, 1, 63]), strict=True):
        metric.update(rows)
    merged = make()
    for metric in parts:
        merged.merge_state(copy.deepcopy(metric))
    assert merged.compute().shape == whole.compute().shape
    assert torch.allclose(merged.compute().double(), whole.compute().double(), rtol=1e-12, atol=0)
    assert all(reduction is not None and reduction([1, 2]) == 3 for reduction in _sums(make()))


def _sums(metric: object) -> list:
    """What each state is reduced with over ranks, as a function of a list of numbers."""
    return [
        lambda values, f=f: f(torch.tensor(values, dtype=torch.float64)).item()
        for name, f in metric._reductions.items()  # type: ignore[attr-defined]
        if name != "numerics"
    ]


def test_merging_alignment_is_exact() -> None:
    g, e = normal(8, 32, seed=1), normal(8, 32, seed=2)
    whole, left, right = GradientAlignment(), GradientAlignment(), GradientAlignment()
    whole.update(g, e)
    left.update(g[:3], e[:3])
    right.update(g[3:], e[3:])
    left.merge_state(right)
    for name, value in whole.compute().items():
        assert left.compute()[name].item() == pytest.approx(value.item(), rel=1e-12)
    assert all(reduction([1, 2]) == 3 for reduction in _sums(GradientAlignment()))


@pytest.mark.parametrize("make", [QuantizationSNR, GradientAlignment])
def test_sums_survive_the_cast_of_the_module_they_belong_to(make: type) -> None:
    metric, cast = make(), make()
    for step in range(2000):
        inputs = (torch.ones(2, 32) * (1 + step % 7),) * (2 if make is GradientAlignment else 1)
        metric.update(*inputs)
        cast.update(*inputs)
        if step == 0:
            torch.nn.ModuleList([cast]).to(torch.bfloat16)
    name = "signal" if make is QuantizationSNR else "dot"
    assert getattr(cast, name).dtype == torch.float64
    assert getattr(cast, name) == pytest.approx(getattr(metric, name).item(), rel=1e-2)


def test_zeros_have_no_noise_and_infinities_show() -> None:
    dead, broken = QuantizationSNR(), QuantizationSNR()
    dead.update(torch.zeros(2, 64))
    assert dead.compute() == math.inf
    broken.update(torch.tensor([1.0, math.inf] * 32)[None])
    assert broken.compute().isnan()


def test_the_backward_rotation_takes_the_signs() -> None:
    x = normal(1, 32)
    signs = torch.where(torch.arange(32) % 3 == 0, -1.0, 1.0)
    a = projection_sums(x * signs, mode="backward")
    b = projection_sums(x, mode="backward", signs=signs)
    assert a.noise == b.noise
    assert b.noise != projection_sums(x, mode="backward").noise


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="mode is 'sideways'"):
        QuantizationSNR(mode="sideways")
    with pytest.raises(ValueError, match="multiple of 32"):
        ClipFraction().update(torch.ones(2, 33))
