"""QuartetMonitor: what MXFP4 does to each layer of a training, measured now and then."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from lightning_quartet.convert import layer_names, matches
from lightning_quartet.gathered import GatheredWeight
from lightning_quartet.linear import QuartetLinear
from lightning_quartet.metrics import (
    EXPONENT_BIAS,
    NAN_BYTE,
    ZERO_BYTE,
    alignment,
    alignment_sums,
    projection_sums,
    snr_db,
)
from lightning_quartet.packed import PackedQuartetLinear
from quartet_kernels.philox import SIGNS_DX, draw_signs

WEIGHTS, INPUTS, OUTPUT_GRADIENTS = "weights", "inputs", "output_gradients"
WEIGHT_GRADIENTS, INPUT_GRADIENTS = "weight_gradients", "input_gradients"
PROJECTIONS = (WEIGHTS, INPUTS, OUTPUT_GRADIENTS)
ALIGNMENTS = (WEIGHT_GRADIENTS, INPUT_GRADIENTS)

_COUNTS = 4  # signal, noise, clipped, elements; the histogram follows
_WIDTHS = {**dict.fromkeys(PROJECTIONS, _COUNTS + 256), **dict.fromkeys(ALIGNMENTS, 3)}
# Of two values of a measure over layers, the one that asks for a look.
_WORST: dict[str, Callable[[Sequence[float]], float]] = {
    "snr_db": min,
    "clip_fraction": max,
    "zero_groups": max,
    "scale_spread": max,
    "cosine": min,
    "projection": min,
}


class QuartetMonitor(Callback):
    """Measures now and then what MXFP4 does to each layer: ``Trainer(callbacks=[QuartetQAT(), QuartetMonitor()])``.

    For weights, inputs and output gradients of a layer: ``snr_db`` (signal to quantisation noise), ``clip_fraction``
    (not of gradients, which never clip), ``zero_groups`` (fraction of groups that hold only zeros: 1 in a dead layer)
    and ``scale_spread`` (octaves from the median scale to the largest: large with an outlier channel). For weight and
    input gradients: ``cosine`` and ``projection`` of what the layer computed on the exact product of its output
    gradient with the unquantised weight or input.

    Names are ``quartet/<layer>/<tensor>/<measure>``, and over all layers ``quartet_mean/<tensor>/<measure>`` and
    ``quartet_worst/<tensor>/<measure>``. All loggers get all of them at the measured step whatever the Trainer's
    ``log_every_n_steps``, TensorBoard also a histogram of scale exponents ``quartet/<layer>/<tensor>/exponents``.
    The summaries go through ``pl_module.log``; ``trainer.callback_metrics`` has all values, and so does
    `latest`, also without a logger.

    The first micro-batch of a measured step is observed; on other steps there are no hooks and no work. Sums are added
    over ranks in one reduction, and read from the device once. Under ``torch.compile`` the observed micro-batch runs
    uncompiled: compiled code does not call the hooks.

    Not measured: inputs and gradients of layers in a high-precision phase, weights that are packed (their exact values
    are gone) or that FSDP1 made flat, alignment where a layer's weight is packed or gathered as 4-bit codes, and
    anything but weights under tensor parallelism.

    Args:
        every_n_steps: Optimizer steps between measurements; step 0 is measured.
        layers: Patterns of layer names, as in `convert_to_quartet`; ``None`` means all
            QuartetLinear layers.
        rows: Rows of a tensor (tokens, output features) that are measured at most, evenly spaced; ``None`` means all.

    Attributes:
        latest: All values of the last measurement, by name.

    Raises:
        ValueError: If ``every_n_steps`` or ``rows`` is no integer of at least 1.
        TypeError: If ``layers`` is not a list of names.
        MisconfigurationException: When the fit starts, if a pattern matches no QuartetLinear or there is none.

    Example:
        ```python
        trainer = Trainer(callbacks=[QuartetQAT(), QuartetMonitor(every_n_steps=200, layers=["layers.0", "lm_head"])])
        ```
    """

    def __init__(self, every_n_steps: int = 100, layers: Sequence[str] | None = None, rows: int | None = 256) -> None:
        if type(every_n_steps) is not int or every_n_steps < 1:
            raise ValueError(
                f"QuartetMonitor: every_n_steps is {every_n_steps!r}; it must be an integer of at least 1."
            )
        if rows is not None and (type(rows) is not int or rows < 1):
            raise ValueError(f"QuartetMonitor: rows is {rows!r}; it must be None or an integer of at least 1.")
        if layers is not None and (isinstance(layers, str) or not all(isinstance(p, str) and p for p in layers)):
            raise TypeError(
                f"QuartetMonitor: layers is {layers!r}; pass a list of names such as ['layers.0'], or None."
            )
        self.every_n_steps = every_n_steps
        self.layers = None if layers is None else tuple(layers)
        self.rows = rows
        self.latest: dict[str, float] = {}
        self._observation: _Observation | None = None
        self._last_step: int | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = None
        self._chosen(pl_module)  # a wrong pattern stops the run here

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._stop()  # the batch before may have been skipped
        step = _step(trainer)
        # The first step of a fit too, whatever it is: who stops or saves by these measures needs them after a resume.
        if step == self._last_step or (self._last_step is not None and step % self.every_n_steps):
            return
        self._last_step = step
        self._observation = _Observation(self._chosen(pl_module), self.rows)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._observation is None:
            return
        observation, self._observation = self._observation, None
        observation.close()
        sums = observation.sums(pl_module.device)
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums, reduce_op="sum")
        table = sums.cpu()  # the only wait for the device
        layers = dict(zip(observation.layers, map(_Layer, table), strict=True))
        self.latest = _values(layers)
        self._log(trainer, pl_module, layers)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._observation is not None:
            self._observation.close()
            self._observation = None

    def _chosen(self, module: nn.Module) -> dict[str, QuartetLinear]:
        """Names and layers to measure."""
        found: dict[str, QuartetLinear] = {}
        unused = set(self.layers or ())
        for layer, names in layer_names(module).items():
            if not isinstance(layer, QuartetLinear):
                continue
            used = {p for p in self.layers or () if any(matches(name, p) for name in names)}
            unused -= used
            if used or self.layers is None:
                found[names[0]] = layer
        if unused:
            raise MisconfigurationException(
                f"QuartetMonitor(layers=...) has {sorted(unused)[0]!r}, which matches no QuartetLinear of "
                f"{type(module).__name__}; correct the pattern or leave it out."
            )
        if not found:
            raise MisconfigurationException(
                f"QuartetMonitor found no QuartetLinear in {type(module).__name__}: add QuartetQAT() to the callbacks."
            )
        return found

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, layers: dict[str, _Layer]) -> None:
        # Only the summaries become entries of Lightning's results, which are walked at every later step; and without
        # the logger there, which would repeat old values at every step that the Trainer logs.
        for name, value in self.latest.items():
            if not name.startswith("quartet/"):
                pl_module.log(name, value, on_step=True, on_epoch=False, logger=False)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.latest.items()})
        step = self._last_step
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.log_metrics(self.latest, step=step)
            add_histogram = getattr(getattr(logger, "experiment", None), "add_histogram_raw", None)
            if add_histogram is None:
                continue
            for name, layer in layers.items():
                for tensor in PROJECTIONS:
                    _add_exponents(add_histogram, f"quartet/{name}/{tensor}/exponents", layer.scales(tensor), step)


class _Observation:
    """Hooks on some layers for one micro-batch, and the sums they collect, float64 [sum of _WIDTHS] a layer.

    Args:
        layers: Names and layers.
        rows: Limit of rows that are measured.
    """

    def __init__(self, layers: dict[str, QuartetLinear], rows: int | None) -> None:
        self.layers = layers
        self._rows = rows
        self._totals: dict[str, dict[str, Tensor]] = {name: {} for name in self.layers}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for name, layer in self.layers.items():
            self._add_weight(name, layer)
            # First of all hooks: others may replace the output.
            self._handles.append(
                layer.register_forward_hook(partial(self._forward, name), prepend=True, with_kwargs=True)
            )
        self._stance = torch.compiler.set_stance("force_eager")

    def close(self) -> None:
        """Take the hooks away."""
        while self._handles:
            self._handles.pop().remove()
        self._stance.__exit__(None, None, None)

    def sums(self, device: torch.device) -> Tensor:
        """All sums, float64 [layers, sum of _WIDTHS]."""
        zeros = {part: torch.zeros(width, dtype=torch.float64, device=device) for part, width in _WIDTHS.items()}
        return torch.stack([torch.cat([*(zeros | totals).values()]) for totals in self._totals.values()])

    def _add(self, name: str, part: str, sums: Sequence[Tensor]) -> None:
        vector = torch.cat([value.double().flatten() for value in sums])
        totals = self._totals[name]
        totals[part] = totals[part] + vector if part in totals else vector

    def _project(self, name: str, part: str, x: Tensor, layer: QuartetLinear, **options: Any) -> None:
        mode = "backward" if part == OUTPUT_GRADIENTS else "forward"
        s = projection_sums(x, layer.quartet_config, mode, **options)  # type: ignore[arg-type]
        self._add(name, part, (s.signal, s.noise, s.clipped, torch.full_like(s.noise, s.elements), s.scales))

    def _add_weight(self, name: str, layer: QuartetLinear) -> None:
        """From the rank's own rows where the weight is sharded; ranks that hold all of it count it alike. Not from
        codes, which is all that packed layers have, and under QuartetFSDP some layers after a skipped batch.
        """
        if isinstance(layer, PackedQuartetLinear) or isinstance(layer.weight, GatheredWeight):
            return
        weight: Any = layer.weight.detach()
        weight = weight.to_local() if hasattr(weight, "to_local") else weight
        weight = getattr(weight, "plain", weight)
        if weight.dim() == 2 and weight.numel():  # not a piece of a flat buffer
            self._project(name, WEIGHTS, weight[:: self._every(weight.shape[0])], layer)

    def _forward(
        self, name: str, layer: QuartetLinear, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> None:
        node = output.grad_fn
        if node is not None and type(node).__name__ == "ViewBackward0":
            node = node.next_functions[0][0]
        if node is None or type(node).__name__ != "_QuartetLinearBackward":
            return  # high precision, a forward without a backward, or one that activation checkpointing will repeat
        x = (args[0] if args else kwargs["input"]).detach()
        x = x.reshape(-1, x.shape[-1])
        if x.shape[0] == 0:
            return
        # Copies of parts: the layer keeps no x, and what comes next may overwrite it.
        step = self._every(x.shape[0])
        columns = -(-x.shape[1] // _COLUMNS)
        node.register_hook(
            partial(
                self._backward, name, layer, layer._quartet_seed.clone(), x[::step].clone(), x[:, ::columns].clone()
            )
        )

    @torch.no_grad()
    def _backward(
        self,
        name: str,
        layer: QuartetLinear,
        seed: Tensor,
        x_rows: Tensor,
        x_columns: Tensor,
        gradients: tuple[Tensor | None, ...],
        output_gradients: tuple[Tensor | None, ...],
    ) -> None:
        """Called once for each forward that is differentiated, so what is recomputed is not counted twice."""
        (dy,) = output_gradients
        if dy is None:
            return
        dx, dw = gradients[0], gradients[1]
        config = layer.quartet_config
        dy = dy.reshape(-1, dy.shape[-1])
        step = self._every(dy.shape[0])
        dy_rows = dy[::step]
        self._project(name, INPUTS, x_rows, layer)
        if config.backward_dtype == "mxfp4":
            signs = draw_signs(seed, SIGNS_DX) if config.randomize_backward else None
            self._project(name, OUTPUT_GRADIENTS, dy_rows, layer, signs=signs, seed=seed)
        weight = layer.weight
        if type(weight) not in (Tensor, nn.Parameter) or tuple(weight.shape) != (layer.out_features, layer.in_features):
            return  # packed, or gathered as 4-bit codes
        if dx is not None:
            exact = dy_rows.float() @ weight.float()
            self._add(name, INPUT_GRADIENTS, alignment_sums(dx.reshape(-1, dx.shape[-1])[::step], exact))
        if dw is not None:
            exact = dy.float().t() @ x_columns.float()
            columns = -(-layer.in_features // _COLUMNS)
            self._add(name, WEIGHT_GRADIENTS, alignment_sums(dw[:, ::columns], exact))

    def _every(self, rows: int) -> int:
        return 1 if self._rows is None else -(-rows // self._rows)


_COLUMNS = 64
"""Input channels whose weight gradients are compared: of each, the inputs of all tokens are kept until the backward."""


class _Layer:
    """Measures of one layer, from its sums."""

    def __init__(self, row: Tensor) -> None:
        self._parts = dict(zip(_WIDTHS, row.split([*_WIDTHS.values()]), strict=True))

    def scales(self, tensor: str) -> Tensor:
        """Histogram of scale bytes, float64 [256]; all zeros where the tensor was not measured."""
        return self._parts[tensor][_COUNTS:]

    def values(self) -> dict[str, float]:
        """``<tensor>/<measure>`` and its value, of what was measured."""
        values = {}
        for tensor in PROJECTIONS:
            signal, noise, clipped, elements = self._parts[tensor][:_COUNTS]
            if elements == 0:
                continue
            values[f"{tensor}/snr_db"] = snr_db(signal, noise).item()
            if tensor != OUTPUT_GRADIENTS:
                values[f"{tensor}/clip_fraction"] = (clipped / elements).item()
            scales = self.scales(tensor)
            values[f"{tensor}/zero_groups"] = (scales[ZERO_BYTE] / scales.sum()).item()
            values[f"{tensor}/scale_spread"] = _spread(scales)
        for tensor in ALIGNMENTS:
            dot, gradient, exact = self._parts[tensor]
            if exact != 0:  # also where it is NaN
                cosine, projection = alignment(dot, gradient, exact)
                values[f"{tensor}/cosine"] = cosine.item()
                values[f"{tensor}/projection"] = projection.item()
        return values


def _spread(scales: Tensor) -> float:
    """Octaves from the median scale to the largest, of groups that are finite and not zero."""
    counts = scales[ZERO_BYTE + 1 : NAN_BYTE]
    used = counts.nonzero().flatten()
    if len(used) == 0:
        return 0.0
    median = (counts.cumsum(0) * 2 >= counts.sum()).nonzero()[0]
    return float(used[-1] - median)


def _values(layers: dict[str, _Layer]) -> dict[str, float]:
    values = {}
    by_measure: dict[str, list[float]] = {}
    for name, layer in layers.items():
        for measure, value in layer.values().items():
            values[f"quartet/{name}/{measure}"] = value
            by_measure.setdefault(measure, []).append(value)
    for measure, all_values in by_measure.items():
        broken = any(map(math.isnan, all_values))
        finite = [value for value in all_values if math.isfinite(value)]
        if broken or finite:
            # The mean is over layers that lose something; one NaN is the news wherever it is.
            values[f"quartet_mean/{measure}"] = math.nan if broken else sum(finite) / len(finite)
            values[f"quartet_worst/{measure}"] = math.nan if broken else _WORST[measure.rpartition("/")[2]](finite)
    return values


def _add_exponents(add_histogram: Callable[..., None], tag: str, scales: Tensor, step: int | None) -> None:
    """The exponents of finite groups that are not zero, one bucket each."""
    counts = scales[ZERO_BYTE + 1 : NAN_BYTE]
    used = counts.nonzero().flatten().tolist()
    if not used:
        return
    low, high = used[0], used[-1]
    counts = counts[low : high + 1]
    exponents = torch.arange(low, high + 1, dtype=torch.float64) + (ZERO_BYTE + 1 - EXPONENT_BIAS)
    add_histogram(
        tag,
        min=exponents[0].item(),
        max=exponents[-1].item(),
        num=counts.sum().item(),
        sum=(counts * exponents).sum().item(),
        sum_squares=(counts * exponents.square()).sum().item(),
        bucket_limits=(exponents + 0.5).tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


def _step(trainer: pl.Trainer) -> int:
    # What Lightning's loggers and its own monitors count by; global_step counts every optimizer.
    return trainer.fit_loop.epoch_loop._batches_that_stepped
