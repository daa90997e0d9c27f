"""What a process holds of a module that is sharded among several (FSDP), or all of one that is not."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["local_parameters"]


def local_parameters(module: nn.Module) -> list[Tensor]:
    """This process's part of each parameter, in the memory of the parameter itself.

    The averaging of weights works on these, as not every fused operation knows sharded tensors.
    """
    return [
        parameter.detach().to_local().requires_grad_(parameter.requires_grad)
        if isinstance(parameter, DTensor)
        else parameter
        for parameter in module.parameters()
    ]
