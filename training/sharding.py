"""What a process holds of a training that is sharded among several (FSDP, DeepSpeed), or all of one that is not."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["is_sharded", "local_parameters"]


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process alone holds a part of the weights (FSDP) or of the optimiser's state (DeepSpeed)."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def local_parameters(module: nn.Module) -> list[Tensor]:
    """This process's part of each parameter, in the memory of the parameter itself.

    The averaging of weights works on these, as not every fused operation knows sharded tensors.
    """
    return [_local(parameter) for parameter in module.parameters()]


def _local(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    with torch.no_grad():
        return parameter.to_local().detach().requires_grad_(parameter.requires_grad)
