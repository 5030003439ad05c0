"""What MXFP4 does to tensors, as torchmetrics: noise, clipping, scales, and how true gradients stay.

Every state is a sum, so metrics merge over batches and ranks: counts exactly, energies to the rounding of float64.
Updates do not wait for the device.
"""

import zlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from quartet_kernels import MXFP4Tensor, QuartetConfig, quantize_mxfp4, unpack_mask
from quartet_kernels.mxfp4 import GROUP_SIZE, decode
from quartet_kernels.reference import rotate
from quartet_kernels.rotation import BACKWARD_GROUP_SIZE, rotation_matrix

Mode = Literal["forward", "backward"]

ZERO_BYTE, NAN_BYTE, EXPONENT_BIAS = 0, 255, 127
"""Scale bytes of a group of zeros and of a group with a NaN or an infinity; byte b of others stands for 2**(b-127)."""


@dataclass(frozen=True)
class ProjectionSums:
    """Sums over a tensor and its MXFP4 projection.

    Attributes:
        signal: Sum of squares of the tensor, float64 scalar.
        noise: Sum of squares of the projection's errors, those of clipping included, float64 scalar.
        clipped: Number of clipped elements, int64 scalar.
        elements: Number of elements.
        scales: How many groups have each scale byte, int64 [256].
    """

    signal: Tensor
    noise: Tensor
    clipped: Tensor
    elements: int
    scales: Tensor


@torch.no_grad()
def projection_sums(
    x: Tensor,
    config: QuartetConfig | None = None,
    mode: Mode = "forward",
    *,
    signs: Tensor | None = None,
    seed: Tensor | int | None = None,
) -> ProjectionSums:
    """Project x by `quartet_kernels.quantize_mxfp4` and compare it, in the rotated basis, with x itself.

    Args:
        x: float [..., K].
        config: Numerics; the default recipe if None.
        mode: ``"forward"`` for weights and inputs, ``"backward"`` for gradients.
        signs: float32 [32] of +-1 in front of the backward's rotation; None means +1.
        seed: Of stochastic rounding, as in `quartet_kernels.quartet_linear`.

    Raises:
        TypeError: If x's dtype cannot be quantised.
        ValueError: If K does not fit, or an option is unknown or does not apply to the mode.
    """
    config = config or QuartetConfig()
    clips = mode == "forward" and config.forward_method == "quest"
    result = quantize_mxfp4(
        x, config=config, mode=mode, signs=signs, seed=seed, return_mask=clips, backend=config.backend
    )
    packed, mask = (result, None) if isinstance(result, MXFP4Tensor) else result
    if mode == "forward":
        matrix = rotation_matrix(config.transform_init, config.hadamard_group_size, x.device)
    else:
        matrix = rotation_matrix("hadamard", BACKWARD_GROUP_SIZE, x.device)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    v = rotate(x.detach().to(wide), matrix, signs)
    error = packed.dequantize(wide) - v
    clipped = torch.zeros((), dtype=torch.int64, device=x.device)
    if mask is not None:
        clipped = (~unpack_mask(mask)).sum()
    # Not bincount, which reads its largest input back from the device.
    scales = torch.zeros(256, dtype=torch.int64, device=x.device)
    bytes_ = packed.scales.flatten().long()
    scales.scatter_add_(0, bytes_, torch.ones_like(bytes_))
    return ProjectionSums(_energy(v), _energy(error), clipped, x.numel(), scales)


def snr_db(signal: Tensor, noise: Tensor) -> Tensor:
    """``10 log10(signal / noise)`` in dB: infinite without noise (also for zeros), NaN where the tensor had one."""
    ratio = 10 * (signal.double() / noise.double()).log10()
    return torch.where(noise == 0, torch.full_like(ratio, torch.inf), ratio)


def alignment(dot: Tensor, gradient: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and projection from ``<g, e>``, ``<g, g>`` and ``<e, e>``; NaN where there is nothing to compare."""
    return dot / (gradient * exact).sqrt(), dot / exact


class _Projected(Metric):
    """Of tensors projected with some numerics. They are a state, too: a ``MetricCollection`` lets metrics whose states
    are equal after one update share them."""

    is_differentiable = False
    full_state_update = False

    def __init__(self, config: QuartetConfig | None, mode: Mode, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config, self.mode = config or QuartetConfig(), _checked(mode)
        number = zlib.crc32(f"{type(self).__name__} {self.config.text} {mode}".encode())
        self.add_state("numerics", torch.tensor(number), dist_reduce_fx="max")


class QuantizationSNR(_Projected):
    """Signal-to-noise ratio of MXFP4 projections, in dB; clipping counts as noise.

    A normal distribution gives about 19 dB with the default recipe. Infinite where nothing is lost (all zeros too), NaN
    as soon as one element was not finite.

    Args:
        config: Numerics; the default recipe if None.
        mode: ``"forward"`` projects as weights and inputs are, ``"backward"`` as gradients are (with signs of +1).
        kwargs: As in `torchmetrics.Metric`.

    Raises:
        ValueError: If the mode is unknown.

    Example:
        ```python
        snr = QuantizationSNR()
        snr.update(layer.weight)
        self.log("weight_snr", snr)
        ```
    """

    higher_is_better = True
    signal: Tensor
    noise: Tensor

    def __init__(self, config: QuartetConfig | None = None, mode: Mode = "forward", **kwargs: Any) -> None:
        super().__init__(config, mode, **kwargs)
        for name in ("signal", "noise"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        """Add a tensor, float [..., K]."""
        sums = projection_sums(x, self.config, self.mode)
        # A module's cast to bfloat16 takes its metrics with it; sums in bfloat16 would stop growing.
        self.signal = self.signal.double() + sums.signal
        self.noise = self.noise.double() + sums.noise

    def compute(self) -> Tensor:
        """The ratio in dB, float64 scalar."""
        return snr_db(self.signal, self.noise)


class _Fraction(_Projected):
    """Elements that were counted, of all."""

    higher_is_better = False
    counted: Tensor
    elements: Tensor

    def __init__(self, config: QuartetConfig | None, mode: Mode, **kwargs: Any) -> None:
        super().__init__(config, mode, **kwargs)
        for name in ("counted", "elements"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """The fraction, float64 scalar."""
        return self.counted.double() / self.elements


class ClipFraction(_Fraction):
    """Fraction of elements that the forward projection clips; their gradients are masked. NaN before any update.

    About 0.01 for a normal distribution with the default recipe; always 0 with ``forward_method="abs_max"``.

    Args:
        config: Numerics; the default recipe if None.
        kwargs: As in `torchmetrics.Metric`.
    """

    def __init__(self, config: QuartetConfig | None = None, **kwargs: Any) -> None:
        super().__init__(config, "forward", **kwargs)

    def update(self, x: Tensor) -> None:
        """Add a tensor, float [..., K]."""
        sums = projection_sums(x, self.config)
        self.counted += sums.clipped
        self.elements += sums.elements


class ScaleExponentHistogram(_Projected):
    """How many groups of 32 have each scale byte.

    Byte b stands for the scale ``2**(b-127)``; byte 0 marks groups of zeros (a dead layer has nothing else), byte 255
    groups with a NaN or an infinity. An outlier channel shows as a second peak, far above the first.

    Args:
        config: Numerics; the default recipe if None.
        mode: ``"forward"`` projects as weights and inputs are, ``"backward"`` as gradients are (with signs of +1).
        kwargs: As in `torchmetrics.Metric`.

    Raises:
        ValueError: If the mode is unknown.
    """

    higher_is_better = None
    scales: Tensor

    def __init__(self, config: QuartetConfig | None = None, mode: Mode = "forward", **kwargs: Any) -> None:
        super().__init__(config, mode, **kwargs)
        self.add_state("scales", torch.zeros(256, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        """Add a tensor, float [..., K]."""
        self.scales += projection_sums(x, self.config, self.mode).scales

    def compute(self) -> Tensor:
        """The counts by scale byte, int64 [256]."""
        return self.scales


class FP8SpanMisses(_Fraction):
    """Fraction of MXFP4 elements that backend ``fp8`` rounds: those too far below the largest scale of their row.

    An FP8 operand holds a row of codes relative to one power of two, exactly over 28 binades (E5M2); this counts what
    lies below. 0 on ordinary data. Backends other than ``fp8`` round nothing.

    Args:
        config: Numerics; the default recipe if None.
        mode: ``"forward"`` projects as weights and inputs are, ``"backward"`` as gradients are (with signs of +1).
        kwargs: As in `torchmetrics.Metric`.

    Raises:
        ValueError: If the mode is unknown.
    """

    def __init__(self, config: QuartetConfig | None = None, mode: Mode = "forward", **kwargs: Any) -> None:
        super().__init__(config, mode, **kwargs)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add a tensor, float [..., K]."""
        packed = quantize_mxfp4(x, config=self.config, mode=self.mode, backend=self.config.backend)
        assert isinstance(packed, MXFP4Tensor)
        codes = decode(packed.codes, torch.full_like(packed.scales, EXPONENT_BIAS)).unflatten(-1, (-1, GROUP_SIZE))
        used = (codes != 0).any(-1) & (packed.scales != NAN_BYTE)
        exponents = packed.scales.to(torch.int32)
        top = torch.where(used, exponents, 0).amax(-1, keepdim=True).clamp_min(EXPONENT_BIAS - 113)
        relative = torch.ldexp(codes, (exponents - top + 13)[..., None])
        # A NaN makes its whole row NaN: nothing is missed there.
        finite = (packed.scales != NAN_BYTE).all(-1, keepdim=True)[..., None]
        self.counted += ((relative.to(torch.float8_e5m2).to(relative.dtype) != relative) & finite).sum()
        self.elements += x.numel()


class GradientAlignment(Metric):
    """Direction and length of MXFP4 gradients g against the exact ones e.

    ``cosine = <g, e> / (|g| |e|)``; ``projection = <g, e> / <e, e>``: 1 for an unbiased g, less where g is too short.
    NaN while one of the two is zero.

    Args:
        kwargs: As in `torchmetrics.Metric`.

    Example:
        ```python
        alignment = GradientAlignment()
        alignment.update(dy_quantized @ weight, dy @ weight)
        alignment.compute()["cosine"]
        ```
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    dot: Tensor
    gradient_energy: Tensor
    exact_energy: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("dot", "gradient_energy", "exact_energy"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, gradient: Tensor, exact: Tensor) -> None:
        """Add a gradient and what it should be, of one shape.

        Raises:
            ValueError: If their shapes differ.
        """
        dot, gradient_energy, exact_energy = alignment_sums(gradient, exact)
        self.dot = self.dot.double() + dot  # as in `QuantizationSNR`
        self.gradient_energy = self.gradient_energy.double() + gradient_energy
        self.exact_energy = self.exact_energy.double() + exact_energy

    def compute(self) -> dict[str, Tensor]:
        """``cosine`` and ``projection``, float64 scalars."""
        cosine, projection = alignment(self.dot, self.gradient_energy, self.exact_energy)
        return {"cosine": cosine, "projection": projection}


@torch.no_grad()
def alignment_sums(gradient: Tensor, exact: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``<g, e>``, ``<g, g>`` and ``<e, e>``, float64 scalars.

    Raises:
        ValueError: If the shapes differ.
    """
    if gradient.shape != exact.shape:
        raise ValueError(
            f"The gradient has shape {tuple(gradient.shape)} and the exact one {tuple(exact.shape)}; make them equal."
        )
    g, e = gradient.detach().double(), exact.detach().double()
    return (g * e).sum(), _energy(g), _energy(e)


def _energy(x: Tensor) -> Tensor:
    return x.square().sum(dtype=torch.float64) if x.dtype == torch.float64 else x.double().square_().sum()


def _checked(mode: Mode) -> Mode:
    if mode not in ("forward", "backward"):
        raise ValueError(f"mode is {mode!r}; choose 'forward' or 'backward'.")
    return mode
