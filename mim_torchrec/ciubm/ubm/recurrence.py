r"""GRU and AUGRU over packed histories (DIEN, Zhou et al., AAAI 2019, Eq. 2–5 and 13–15).

In DIEN's convention, with attention $a_t$ (1 is the GRU):

    r = σ(W_r x_t + U_r h + b_r)      u = a_t σ(W_u x_t + U_u h + b_u)
    n = tanh(W_n x_t + r ∘ (U_n h + b_n') + b_n)      h' = (1 − u) ∘ h + u ∘ n

`torch.nn.GRU` has 1 − u for u: its update-gate weights are these negated. Positions are laid out by time,
the longest history first, so that the histories still running at a step are a prefix and none is padded.

One autograd function runs all steps. It saves its gates as rows of whole buffers, makes the gradient of the
recurrent weights one product after the last step, and reads the input's projection, which depends on the
history alone, from where the history has it for all its candidates.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class TimeOrder:
    """Positions of ragged sequences ordered by time, then from the longest sequence to the shortest.

    Attributes:
        rank: (num_sequences,) the place of each sequence among them all, the longest first.
        position: (num_positions,) where each position of the sequences, one after the other, stands.
        steps: number of sequences that are running at each step; not increasing.
    """

    rank: Tensor
    position: Tensor
    steps: list[int]

    @classmethod
    def of(cls, offsets: Tensor, rank: Tensor | None = None) -> "TimeOrder":
        """Order sequences given by their offsets (num_sequences + 1,).

        Args:
            offsets: where each sequence starts.
            rank: an order that puts longer sequences first; by default one is found.
        """
        lengths = offsets.diff()
        if rank is None:
            rank = inverse(lengths.argsort(descending=True, stable=True))
        if not int(lengths.sum()):
            return cls(rank, lengths.new_zeros(0), [])
        longest = int(lengths.max())
        running = lengths.numel() - lengths.bincount(minlength=longest + 1).cumsum(0)[:longest]
        starts = F.pad(running.cumsum(0), (1, 0))
        owner = torch.repeat_interleave(torch.arange(lengths.numel(), device=offsets.device), lengths)
        time = torch.arange(owner.numel(), device=offsets.device) - offsets[owner]
        return cls(rank, starts[time] + rank[owner], running.tolist())


def inverse(permutation: Tensor) -> Tensor:
    """The permutation that undoes one, (n,) int64."""
    places = torch.arange(permutation.numel(), device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, places)


class AttentionalGRU(nn.Module):
    """GRU whose update gate can be scaled by attention (AUGRU).

    Rows of its weights are in the order reset, update, new, as in `torch.nn.GRU`.

    Args:
        input_dim: size of an input.
        hidden_dim: size of a state.
    """

    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.input = nn.Linear(input_dim, 3 * hidden_dim)
        self.hidden = nn.Linear(hidden_dim, 3 * hidden_dim)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden_dim**-0.5), hidden_dim**-0.5)  # as in torch.nn.GRU

    def states(self, inputs: Tensor, order: TimeOrder) -> Tensor:
        """State after each position, without attention: the GRU.

        Args:
            inputs: (num_positions, input_dim) in time order.
            order: of the sequences.

        Returns:
            (num_positions, hidden_dim) in time order.
        """
        weight, bias = self.hidden.weight, self.hidden.bias
        states, _ = _Recurrence.apply(self.input(inputs), None, weight, bias, order.steps, order.steps, None)
        return states

    def last_state(
        self, inputs: Tensor, attention: Tensor, order: TimeOrder, inputs_order: TimeOrder, owner: Tensor
    ) -> Tensor:
        """State after the last position of each sequence, of which several may share inputs: the AUGRU.

        Args:
            inputs: (num_inputs, input_dim) in the time order of the sequences of inputs.
            attention: (num_positions,) in the time order of the sequences.
            order: of the sequences, which puts those that share inputs side by side.
            inputs_order: of the sequences of inputs.
            owner: (num_sequences,) which sequence of inputs each has, by their ranks in both orders;
                ascending.

        Returns:
            (num_sequences, hidden_dim) by rank; zeros for a sequence without positions.
        """
        running = order.steps[0] if order.steps else 0
        each_has_its_own = order.steps == inputs_order.steps and torch.equal(
            owner[:running], torch.arange(running, device=owner.device)
        )
        _, last = _Recurrence.apply(
            self.input(inputs),
            attention,
            self.hidden.weight,
            self.hidden.bias,
            order.steps,
            inputs_order.steps,
            None if each_has_its_own else owner,
        )
        return F.pad(last, (0, 0, 0, owner.numel() - last.shape[0]))


class _Recurrence(torch.autograd.Function):
    """All steps; returns the state of each position (None with attention), and each sequence's last state."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        attention: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        steps: list[int],
        input_steps: list[int],
        owner: Tensor | None,
    ) -> tuple[Tensor | None, Tensor]:
        dim = weight.shape[1]
        total = sum(steps)
        before, new, recurrent = (x.new_empty(total, dim) for _ in range(3))
        gates = x.new_empty(total, 2 * dim)
        states = x.new_empty(total, dim) if attention is None else None
        h = x.new_zeros(steps[0] if steps else 0, dim)
        transposed = weight.t()
        scratch = x.new_empty(h.shape[0], 3 * dim)
        row = x_row = 0
        for running, x_running in zip(steps, input_steps, strict=False):  # inputs may go unused at the end
            x_t = x[x_row : x_row + x_running]
            if owner is not None:
                x_t = x_t.index_select(0, owner[:running])
            rows = slice(row, row + running)
            h_t, w_h, gate, n = h[:running], scratch[:running], gates[rows], new[rows]
            before[rows] = h_t
            torch.addmm(bias, h_t, transposed, out=w_h)
            recurrent[rows] = w_h[:, 2 * dim :]
            torch.add(x_t[:, : 2 * dim], w_h[:, : 2 * dim], out=gate).sigmoid_()
            torch.addcmul(x_t[:, 2 * dim :], gate[:, :dim], w_h[:, 2 * dim :], out=n).tanh_()
            h_t.lerp_(n, gate[:, dim:] if attention is None else gate[:, dim:] * attention[rows, None])
            if states is not None:
                states[rows] = h_t
            row, x_row = row + running, x_row + x_running
        ctx.save_for_backward(attention, weight, before, gates, new, recurrent, owner)
        ctx.sizes = steps, input_steps, x.shape
        ctx.set_materialize_grads(False)
        return states, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_states: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
        attention, weight, before, gates, new, recurrent, owner = ctx.saved_tensors
        steps, input_steps, x_shape = ctx.sizes
        total, dim = before.shape
        grad_w_h = before.new_empty(total, 3 * dim)
        grad_n = before.new_empty(total, dim)
        grad_attention = None if attention is None else before.new_empty(total)
        if grad_last is None:
            grad_h = before.new_zeros(steps[0] if steps else 0, dim)
        else:
            grad_h = grad_last.clone()
        tanh_backward = torch.ops.aten.tanh_backward.grad_input
        sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
        row = total
        for running in reversed(steps):
            row -= running
            rows = slice(row, row + running)
            d_h = grad_h[:running]
            if grad_states is not None:
                d_h += grad_states[rows]
            reset, update = gates[rows, :dim], gates[rows, dim:]
            n, d_w = new[rows], grad_w_h[rows]
            d_update = d_h * (n - before[rows])
            scaled = update
            if grad_attention is not None:
                torch.sum(d_update * update, dim=1, out=grad_attention[rows])
                d_update *= attention[rows, None]
                scaled = update * attention[rows, None]
            d_n = tanh_backward(d_h * scaled, n, grad_input=grad_n[rows])
            torch.mul(d_n, reset, out=d_w[:, 2 * dim :])
            sigmoid_backward(d_n * recurrent[rows], reset, grad_input=d_w[:, :dim])
            sigmoid_backward(d_update, update, grad_input=d_w[:, dim : 2 * dim])
            d_h.addcmul_(d_h, scaled, value=-1).addmm_(d_w, weight)
        d_weight = grad_w_h.t() @ before
        d_bias = grad_w_h.sum(0)
        grad_w_h[:, 2 * dim :] = grad_n  # from here on the gradient of the input's projection
        grad_x = grad_w_h
        if owner is not None:
            grad_x = before.new_zeros(x_shape)
            row = x_row = 0
            for running, x_running in zip(steps, input_steps, strict=False):
                grad_x[x_row : x_row + x_running].index_add_(
                    0, owner[:running], grad_w_h[row : row + running]
                )
                row, x_row = row + running, x_row + x_running
        return grad_x, grad_attention, d_weight, d_bias, None, None, None
