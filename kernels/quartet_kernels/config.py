"""What is computed: one frozen, validated configuration and its named recipes."""

import ast
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

ForwardMethod = Literal["quest", "abs_max"]
Statistic = Literal["rms", "std"]
ScaleRule = Literal["mse", "nearest", "floor"]
TransformInit = Literal["hadamard", "gsr", "identity"]
BackwardDtype = Literal["mxfp4", "mxfp8", "bf16"]
Rounding = Literal["nearest", "stochastic"]
Accumulation = Literal["auto", "fast", "precise"]
BackendName = Literal["auto", "reference", "triton", "fp8", "bf16", "native"]

HADAMARD_GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class QuartetConfig:
    """Numerics of a Quartet linear layer (arXiv 2505.14669); the defaults are recipe ``quartet``.

    Args:
        forward_method: Projection of rotated activations and weights to MXFP4. ``"quest"`` scales a group by its
            ``statistic`` and clips; ``"abs_max"`` scales it by its largest magnitude and never clips.
        statistic: What ``"quest"`` measures of a group: ``"rms"``, or the centred ``"std"`` of the released code.
        scale_rule: How ``"quest"`` rounds its scale to a power of two: ``"mse"`` takes the neighbour with the smaller
            squared error, ``"nearest"`` the nearest in logarithm, ``"floor"`` the one below (released code).
        hadamard_group_size: Width of the forward rotation's blocks: 32, 64 or 128. Scale groups stay 32 wide.
        transform_init: The forward rotation: ``"hadamard"``, ``"gsr"`` (its columns sorted by sign changes), or
            ``"identity"`` (none; what runtimes without rotations can load).
        backward_dtype: ``"mxfp4"`` runs both gradient GEMMs in 4 bits; ``"mxfp8"`` in 8 (E4M3, rounded to nearest,
            not rotated); ``"bf16"`` is straight-through with mask.
        backward_rounding: Of ``"mxfp4"``: ``"nearest"`` (paper v4) or unbiased ``"stochastic"`` (paper v1-v3).
        randomize_backward: Draw random signs for the backward rotations at every step.
        store_master_weights: ``False`` makes conversion keep only the weight's codes and scales: no weight gradient.
        recompute_inputs: ``True`` makes layers under ``torch.compile`` whose weight trains quantise their input once
            more in the backward instead of keeping its codes. That is less memory where the input is kept anyway
            (attention's output) or comes from what is kept (norms, gates, SiLU and GELU), as in Llama's blocks, and
            more where it would not be (another linear layer, ReLU, dropout). No effect on layers that are not compiled.
        accumulation: FP8 tensor cores only: ``"fast"`` keeps the hardware's accumulator, ``"precise"`` promotes it to
            float32 every 128 products; ``"auto"`` chooses per GEMM.
        backend: ``"auto"`` or the name of a backend, see `quartet_kernels.available_backends`.
        seed: Key of all randomness, 0 <= seed < 2**32.

    Raises:
        ValueError: If an option has an unknown value.
    """

    forward_method: ForwardMethod = "quest"
    statistic: Statistic = "rms"
    scale_rule: ScaleRule = "mse"
    hadamard_group_size: int = 32
    transform_init: TransformInit = "hadamard"
    backward_dtype: BackwardDtype = "mxfp4"
    backward_rounding: Rounding = "nearest"
    randomize_backward: bool = True
    store_master_weights: bool = True
    recompute_inputs: bool = False
    accumulation: Accumulation = "auto"
    backend: BackendName = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
                allowed = ", ".join(repr(choice) for choice in choices)
                raise ValueError(f"QuartetConfig.{name} is {value!r}; choose one of {allowed}.")
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise ValueError(f"QuartetConfig.seed is {self.seed!r}; choose an integer from 0 to 2**32 - 1.")
        # Made once: every call of an operator takes it.
        options = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "seed"}
        object.__setattr__(self, "_text", repr(options))

    @property
    def text(self) -> str:
        """All options but the seed as a Python literal, which is how operators take them.

        They take seeds as tensors; in here, each seed would be compiled anew.
        """
        return self._text  # type: ignore[attr-defined]

    @property
    def rotation_width(self) -> int:
        """Elements that the forward's rotation mixes, 32 (a scale's group) without one: in_features is a multiple."""
        return 32 if self.transform_init == "identity" else self.hadamard_group_size

    @classmethod
    def from_recipe(cls, name: str, **changes: Any) -> Self:
        """The configuration of a named recipe, see `RECIPES`; ``changes`` replace single options.

        Raises:
            ValueError: If there is no such recipe or option.
        """
        if name not in RECIPES:
            raise ValueError(f"There is no recipe {name!r}; choose one of {', '.join(map(repr, RECIPES))}.")
        return cls.from_dict({**RECIPES[name], **changes})

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; options that are left out take their defaults.

        Raises:
            ValueError: If an option is unknown or has an unknown value.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                raise ValueError(f"QuartetConfig has no option {name!r}; its options are {', '.join(names)}.")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """All options as plain strings, integers and booleans."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"QuartetConfig({', '.join(changed)})"


@functools.lru_cache(maxsize=256)
def parse_config(text: str) -> QuartetConfig:
    """The inverse of `QuartetConfig.text`, with seed 0."""
    return QuartetConfig.from_dict(ast.literal_eval(text))


_CHOICES: dict[str, tuple[Any, ...]] = {
    "forward_method": get_args(ForwardMethod),
    "statistic": get_args(Statistic),
    "scale_rule": get_args(ScaleRule),
    "hadamard_group_size": HADAMARD_GROUP_SIZES,
    "transform_init": get_args(TransformInit),
    "backward_dtype": get_args(BackwardDtype),
    "backward_rounding": get_args(Rounding),
    "randomize_backward": (True, False),
    "store_master_weights": (True, False),
    "recompute_inputs": (True, False),
    "accumulation": get_args(Accumulation),
    "backend": get_args(BackendName),
}

RECIPES: dict[str, dict[str, Any]] = {
    "quartet": {},
    "quartet_stochastic": {"backward_rounding": "stochastic"},
    "mxfp8_backward": {"backward_dtype": "mxfp8"},
    "bf16_backward": {"backward_dtype": "bf16"},
    "fp_quant": {"statistic": "std", "scale_rule": "floor"},
}
"""Named recipes: what each changes from the defaults. ``fp_quant`` reproduces fp-quant 0.3.2 (std, floor, nearest)."""
