"""A QuartetLinear cut by tensor parallelism (``ColwiseParallel``, ``RowwiseParallel``): its weight is a DTensor.

Groups of 32 lie along in_features for the forward and along out_features for the backward. A cut that keeps them whole
lets every rank quantise its piece on its own, with the codes that the whole weight has.
"""

from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from quartet_kernels import QuartetConfig, quartet_linear
from quartet_kernels.mxfp4 import GROUP_SIZE


def parallel_linear(input: Tensor, weight: Any, bias: Any, config: QuartetConfig, seed: Tensor) -> Tensor:
    """``quartet_linear`` of DTensors on a mesh of one axis.

    Args:
        input: DTensor [..., in_features]; cut like the weight's in_features, or whole.
        weight: DTensor [out_features, in_features], cut along one of the two, or whole.
        bias: DTensor [out_features], or ``None``.
        config: The numerics.
        seed: This rank's.

    Returns:
        DTensor [..., out_features]: cut where out_features is, or a sum that is still to be taken where in_features is.

    Raises:
        MisconfigurationException: If the weight is not that of tensor parallelism, or the cut goes through a group.
    """
    if weight.device_mesh.ndim != 1 or not isinstance(input, DTensor):
        raise MisconfigurationException(
            f"A QuartetLinear has a weight cut as {weight.placements} over {weight.device_mesh.ndim} axes of a mesh "
            f"and an input of type {type(input).__name__}; cut it with ColwiseParallel or RowwiseParallel, and call it "
            "through the module that fully_shard was given."
        )
    mesh, (placement,) = weight.device_mesh, weight.placements
    _check_groups(weight, placement, mesh.size(), config)
    local = weight.to_local()
    if config.backward_rounding == "stochastic" and placement != Replicate():
        # Ranks that share a batch have one seed, for what each of them has whole; their pieces round independently.
        seed = seed.clone()
        seed[2] += (mesh.get_local_rank() * (torch.distributed.get_world_size() // mesh.size())) << 16
    if placement == Shard(1):
        x = input.redistribute(mesh, [Shard(input.ndim - 1)]).to_local()
        part = quartet_linear(x, local, config=config, seed=seed)
        total = DTensor.from_local(part, mesh, [Partial()], run_check=False)
        return total if bias is None else total.redistribute(mesh, [Replicate()]) + bias
    # Every rank's part of out_features adds to the gradient of a whole input.
    cut = placement == Shard(0)
    x = input.redistribute(mesh, [Replicate()]).to_local(grad_placements=[Partial() if cut else Replicate()])
    y = quartet_linear(x, local, None if bias is None else bias.to_local(), config=config, seed=seed)
    return DTensor.from_local(y, mesh, [Shard(y.ndim - 1) if cut else Replicate()], run_check=False)


def _check_groups(weight: DTensor, placement: Any, size: int, config: QuartetConfig) -> None:
    for axis, name, unit in ((0, "out_features", GROUP_SIZE), (1, "in_features", config.rotation_width)):
        if placement == Shard(axis) and weight.shape[axis] % (unit * size):
            raise MisconfigurationException(
                f"Tensor parallelism over {size} ranks cuts a QuartetLinear whose {name} is {weight.shape[axis]}; it "
                f"must be a multiple of {unit} x {size}; use fewer ranks or list the layer in modules_to_not_convert."
            )
