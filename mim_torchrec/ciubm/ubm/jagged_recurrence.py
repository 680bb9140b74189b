"""GRU and AUGRU of ragged sequences as two operators, for GPUs; `recurrence.py` has their equations.

Steps that are launched one by one have the host of a GPU launch some thousand kernels a batch. Here all steps
are one operator, and their gradients another: on a GPU a Triton kernel each (`recurrence_kernels.py`). Their
form on a CPU, a step at a time, is what a rehearsal runs and what the kernels are tested against. A CPU
trains by `recurrence.py`, whose steps have no padding and no copies of inputs that sequences share.

Positions are in the order of their sequences. The gradient of the recurrent weights is one product outside.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mim_torchrec.ciubm.packed import PairIndices, sum_by_behavior


@torch.library.custom_op("mim_torchrec::recurrence", mutates_args=(), device_types="cpu")
def forward(
    x: Tensor, attention: Tensor | None, weight: Tensor, bias: Tensor, offsets: Tensor, shift: Tensor | None
) -> list[Tensor]:
    """All steps.

    Args:
        x: (num_inputs, 3 dim) float32, the inputs' projections by gate: reset, update, new.
        attention: (num_positions,) float32; None is the GRU.
        weight: (3 dim, dim) of the states.
        bias: (3 dim,) likewise.
        offsets: (num_sequences + 1,) int64, where the positions of each sequence start.
        shift: (num_sequences,) int64, what makes the number of a position that of its input; None is 0.

    Returns:
        States after each position (num_positions, dim), or with attention the last state of each sequence
        (num_sequences, dim), zeros without positions. Then for the gradients by position: the state before,
        both gates, the new state, and its recurrent part.
    """
    dim, lengths = weight.shape[1], offsets.diff()
    positions = x.shape[0] if attention is None else attention.shape[0]
    states, before, new, recurrent = (x.new_empty(positions, dim) for _ in range(4))
    gates = x.new_empty(positions, 2 * dim)
    h = x.new_zeros(lengths.numel(), dim)
    for step in range(int(lengths.max()) if lengths.numel() else 0):
        running = (lengths > step).nonzero().squeeze(1)
        row = offsets[running] + step
        x_t = x[row if shift is None else row + shift[running]]
        before[row] = h[running]
        w_h = torch.addmm(bias, h[running], weight.t())
        gates[row] = (x_t[:, : 2 * dim] + w_h[:, : 2 * dim]).sigmoid()
        reset, update = gates[row].chunk(2, dim=1)
        recurrent[row] = w_h[:, 2 * dim :]
        new[row] = (x_t[:, 2 * dim :] + reset * recurrent[row]).tanh()
        if attention is not None:
            update = update * attention[row, None]
        h[running] = states[row] = h[running].lerp(new[row], update)
    return [states if attention is None else h, before, gates, new, recurrent]


@torch.library.custom_op("mim_torchrec::recurrence_backward", mutates_args=(), device_types="cpu")
def backward(
    grad: Tensor, attention: Tensor | None, weight: Tensor, offsets: Tensor, saved: list[Tensor]
) -> list[Tensor]:
    """Gradients of all steps.

    Args:
        grad: of the first result of `forward`.
        attention: as there.
        weight: as there.
        offsets: as there.
        saved: the other results.

    Returns:
        Gradients by position of the projected states (num_positions, 3 dim), of what enters the new state
        (num_positions, dim), and of attention (num_positions,), which without attention is empty.
    """
    before, gates, new, recurrent = saved
    (positions, dim), lengths = before.shape, offsets.diff()
    grad_recurrent, grad_new = before.new_empty(positions, 3 * dim), before.new_empty(positions, dim)
    grad_attention = before.new_empty(0 if attention is None else positions)
    d_h = before.new_zeros(lengths.numel(), dim) if attention is None else grad.clone()
    for step in reversed(range(int(lengths.max()) if lengths.numel() else 0)):
        running = (lengths > step).nonzero().squeeze(1)
        row = offsets[running] + step
        d = d_h[running] if attention is not None else d_h[running] + grad[row]
        reset, update = gates[row].chunk(2, dim=1)
        d_update, scaled = d * (new[row] - before[row]), update
        if attention is not None:
            grad_attention[row] = (d_update * update).sum(1)
            scaled = update * attention[row, None]
            d_update = d_update * attention[row, None]
        d_new = d * scaled * (1 - new[row] ** 2)
        d_reset = d_new * recurrent[row] * reset * (1 - reset)
        d_states = torch.cat([d_reset, d_update * update * (1 - update), d_new * reset], dim=1)
        grad_new[row], grad_recurrent[row] = d_new, d_states
        d_h[running] = d * (1 - scaled) + d_states @ weight
    return [grad_recurrent, grad_new, grad_attention]


@forward.register_kernel("cuda")
def _(*arguments: Any) -> list[Tensor]:
    from mim_torchrec.ciubm.recurrence_kernels import run_forward  # Triton comes with torch for GPUs

    return run_forward(*arguments)


@backward.register_kernel("cuda")
def _(*arguments: Any) -> list[Tensor]:
    from mim_torchrec.ciubm.recurrence_kernels import run_backward

    return run_backward(*arguments)


def gru(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
    """States after each position, (num_positions, dim); arguments as of `forward`."""
    return _JaggedRecurrence.apply(x.to(weight.dtype), None, weight, bias, offsets, None, None)


def augru(
    x: Tensor, attention: Tensor, weight: Tensor, bias: Tensor, pairs: PairIndices, shift: Tensor
) -> Tensor:
    """The last state of each candidate, (sum_candidates, dim), over the pairs that it has.

    Args:
        x: (sum_behaviors, 3 dim) the behaviors' projections; otherwise as of `forward`.
        attention: (num_pairs,).
        weight: as of `forward`.
        bias: as of `forward`.
        pairs: the pairs; those of a candidate are with behaviors that follow each other.
        shift: (sum_candidates,) what makes the number of a pair that of its behavior.
    """
    x, attention = x.to(weight.dtype), attention.to(weight.dtype)
    return _JaggedRecurrence.apply(x, attention, weight, bias, pairs.pair_offsets, shift, pairs)


class _JaggedRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        attention: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        offsets: Tensor,
        shift: Tensor | None,
        pairs: PairIndices | None,
    ) -> Tensor:
        out, *saved = forward(x, attention, weight, bias, offsets, shift)
        ctx.save_for_backward(attention, weight, offsets, *saved)
        ctx.pairs = pairs
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        attention, weight, offsets, *saved = ctx.saved_tensors
        grad_x, grad_new, grad_attention = backward(grad, attention, weight, offsets, saved)
        d_weight, d_bias = grad_x.t() @ saved[0], grad_x.sum(0)
        grad_x[:, 2 * weight.shape[1] :] = grad_new
        if ctx.pairs is not None:
            grad_x = sum_by_behavior(grad_x, ctx.pairs)
        return grad_x, None if attention is None else grad_attention, d_weight, d_bias, None, None, None
