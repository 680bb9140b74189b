"""A model on several ranks: gradients averaged by DDP, or large parts divided by FSDP2.

FSDP2 (`fully_shard`) divides weights, gradients and optimizer state of the parts that it is given; whatever
else is trained stays whole on every rank, and its gradients are averaged as DDP does. Parts must be called,
by `forward`, as often and in the same order on all ranks.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm

from mim_torchrec.errors import OptionError
from mim_torchrec.training.distributed import DistributedContext

Parallel = Literal["ddp", "fsdp"]
BLOCKS = ("Block", "Layer", "Bottleneck", "Residual", "BlockPostNorm")


def parallelize(
    model: nn.Module,
    kind: Parallel,
    parts: Sequence[nn.Module],
    context: DistributedContext,
    *,
    bf16: bool = False,
    **options: Any,
) -> nn.Module:
    """Make a model train on all ranks, whose losses' mean is the loss.

    Args:
        model: on the rank's device, alike on all ranks.
        kind: `ddp` or `fsdp`.
        parts: what FSDP2 divides: large modules of the model, such as towers.
        context: the process group.
        bf16: parts compute in bfloat16, so FSDP2 gathers their weights as such, half the bytes; a part with
            batch normalization, whose kernels take float32 weights, is gathered as it is. Every rank keeps
            its share in float32, and gradients are added up in float32.
        options: of `DistributedDataParallel`.

    Returns:
        What to call in training; the model itself for FSDP2 and on one rank.

    Raises:
        OptionError: FSDP2 is asked for and there is nothing to divide.
    """
    if kind == "ddp":
        if context.world_size == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, **options)
    if not parts:
        raise OptionError("fsdp divides towers that are trained, and none is; take ddp")
    mesh = init_device_mesh(context.device.type, (context.world_size,))
    for part in parts:
        policy = _policy(part, bf16)
        for block in blocks(part):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(part, mesh=mesh, mp_policy=policy)
    divided = {id(parameter) for part in parts for parameter in part.parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in divided and context.world_size > 1:
            parameter.register_post_accumulate_grad_hook(_average)
    return model


def _policy(part: nn.Module, bf16: bool) -> MixedPrecisionPolicy:
    if not bf16 or any(isinstance(module, _BatchNorm) for module in part.modules()):
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules whose class is a block or a layer, the units that FSDP2 gathers at a time."""
    for child in model.children():
        named = type(child).__name__.endswith(BLOCKS)
        if named and next(child.parameters(), None) is not None:
            yield child
        else:
            yield from blocks(child)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """State of a model whose parts are divided, gathered on the CPU of rank 0; {} elsewhere."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def synchronize_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0, as DDP does before a step and FSDP2 never.

    In between, the running statistics of batch normalization are those of a rank's own batches, and ranks
    would evaluate different models.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def gradient_norm(model: nn.Module) -> Tensor:
    """Length of the gradient of all parameters together, whether whole or divided; every rank calls it.

    Tables whose optimizer is fused into the backward pass have no gradient to measure.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    divided = [g for g in gradients if isinstance(g, DTensor)]
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    norms = [get_total_norm(whole)]
    if divided:
        norms.append(cast(DTensor, get_total_norm(divided)).full_tensor().to(norms[0].device))
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_gradient(model: nn.Module, norm: Tensor, limit: float) -> None:
    """Shorten the gradient of all parameters together to a limit, if it is longer.

    Args:
        model: whose `gradient_norm` is known.
        norm: that length, a scalar.
        limit: longest gradient that is left as it is.
    """
    factor = (limit / norm).clamp(max=1.0)  # of a gradient of 0 the limit is infinitely often its length
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def _average(parameter: Tensor) -> None:
    assert parameter.grad is not None  # it is called after the gradient was accumulated
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()
