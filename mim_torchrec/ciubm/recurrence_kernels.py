"""GRU and AUGRU on a GPU: a Triton kernel runs all steps of a block of sequences, another their gradients.

`jagged_recurrence.py` says what they compute. Sequences of a block run as many steps as the longest of them;
where one has ended, its loads and stores are masked. Products with the recurrent weights are summed over
slices of the weights' rows, so that a block needs little shared memory, whatever the dimension. The other
factor of a slice is read from where the block has just written it, which is why threads wait for each other.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16
"""Sequences of a program: the fewest rows of a product in Triton."""


@triton.jit
def forward_kernel(
    x, attention, weight, bias, offsets, shift,
    out, before, gates, new, recurrent, num_sequences, dim,
    ATTENTION: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """All steps of BLOCK sequences; WIDTH is the next power of two of the dimension."""
    sequence = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = sequence < num_sequences
    start = tl.load(offsets + sequence, mask=exists, other=0)
    length = tl.load(offsets + sequence + 1, mask=exists, other=0) - start
    source = start
    if SHIFT:
        source += tl.load(shift + sequence, mask=exists, other=0)
    column = tl.arange(0, WIDTH)
    inside = column < dim
    bias_r = tl.load(bias + column, mask=inside, other=0.0)[None, :]
    bias_u = tl.load(bias + dim + column, mask=inside, other=0.0)[None, :]
    bias_n = tl.load(bias + 2 * dim + column, mask=inside, other=0.0)[None, :]
    h = tl.zeros((BLOCK, WIDTH), tl.float32)
    for step in range(tl.max(length, 0)):
        running = step < length
        mask = running[:, None] & inside[None, :]
        row = (start + step)[:, None]
        at, at_gate = row * dim + column[None, :], row * 2 * dim + column[None, :]
        at_x = (source + step)[:, None] * 3 * dim + column[None, :]
        tl.store(before + at, h, mask=mask)
        tl.debug_barrier()
        h_r = tl.zeros((BLOCK, WIDTH), tl.float32) + bias_r
        h_u = tl.zeros((BLOCK, WIDTH), tl.float32) + bias_u
        h_n = tl.zeros((BLOCK, WIDTH), tl.float32) + bias_n
        for first in tl.range(0, dim, SLICE, num_stages=1):
            part = first + tl.arange(0, SLICE)
            in_part = part < dim
            h_part = tl.load(
                before + row * dim + part[None, :], mask=running[:, None] & in_part[None, :], other=0.0
            )
            of_weight = column[None, :] * dim + part[:, None]  # transposed
            in_weight = inside[None, :] & in_part[:, None]
            w_r = tl.load(weight + of_weight, mask=in_weight, other=0.0)
            h_r = tl.dot(h_part, w_r, h_r, input_precision="ieee")
            w_u = tl.load(weight + dim * dim + of_weight, mask=in_weight, other=0.0)
            h_u = tl.dot(h_part, w_u, h_u, input_precision="ieee")
            w_n = tl.load(weight + 2 * dim * dim + of_weight, mask=in_weight, other=0.0)
            h_n = tl.dot(h_part, w_n, h_n, input_precision="ieee")
        r = 1.0 / (1.0 + tl.exp(-(tl.load(x + at_x, mask=mask, other=0.0) + h_r)))
        u = 1.0 / (1.0 + tl.exp(-(tl.load(x + at_x + dim, mask=mask, other=0.0) + h_u)))
        x_n = tl.load(x + at_x + 2 * dim, mask=mask, other=0.0)
        n = 1.0 - 2.0 / (tl.exp(2.0 * (x_n + r * h_n)) + 1.0)  # tanh
        tl.store(gates + at_gate, r, mask=mask)
        tl.store(gates + at_gate + dim, u, mask=mask)
        tl.store(recurrent + at, h_n, mask=mask)
        tl.store(new + at, n, mask=mask)
        if ATTENTION:
            u *= tl.load(attention + start + step, mask=running, other=0.0)[:, None]
        h = tl.where(mask, h + u * (n - h), h)
        if not ATTENTION:
            tl.store(out + at, h, mask=mask)
    if ATTENTION:
        tl.store(out + sequence[:, None] * dim + column[None, :], h, mask=exists[:, None] & inside[None, :])


@triton.jit
def backward_kernel(
    grad, attention, weight, before, gates, new, recurrent, offsets,
    grad_recurrent, grad_new, grad_attention, num_sequences, dim,
    ATTENTION: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK sequences, from their last steps to their first."""
    sequence = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = sequence < num_sequences
    start = tl.load(offsets + sequence, mask=exists, other=0)
    length = tl.load(offsets + sequence + 1, mask=exists, other=0) - start
    column = tl.arange(0, WIDTH)
    inside = column < dim
    d_h = tl.zeros((BLOCK, WIDTH), tl.float32)
    if ATTENTION:
        of_sequence = sequence[:, None] * dim + column[None, :]
        d_h = tl.load(grad + of_sequence, mask=exists[:, None] & inside[None, :], other=0.0)
    longest = tl.max(length, 0)
    for back in range(longest):
        step = longest - 1 - back
        running = step < length  # elsewhere r and u are 0, and d_h stays what it is
        mask = running[:, None] & inside[None, :]
        row = (start + step)[:, None]
        at = row * dim + column[None, :]
        at_gate, at_w = row * 2 * dim + column[None, :], row * 3 * dim + column[None, :]
        if not ATTENTION:
            d_h += tl.load(grad + at, mask=mask, other=0.0)
        r = tl.load(gates + at_gate, mask=mask, other=0.0)
        u = tl.load(gates + at_gate + dim, mask=mask, other=0.0)
        n = tl.load(new + at, mask=mask, other=0.0)
        d_u = d_h * (n - tl.load(before + at, mask=mask, other=0.0))
        scaled = u
        if ATTENTION:
            a = tl.load(attention + start + step, mask=running, other=0.0)[:, None]
            tl.store(grad_attention + start + step, tl.sum(d_u * u, 1), mask=running)
            d_u *= a
            scaled = u * a
        d_n = d_h * scaled * (1.0 - n * n)
        d_r = d_n * tl.load(recurrent + at, mask=mask, other=0.0) * r * (1.0 - r)
        d_u *= u * (1.0 - u)
        d_w = d_n * r
        tl.store(grad_new + at, d_n, mask=mask)
        tl.store(grad_recurrent + at_w, d_r, mask=mask)
        tl.store(grad_recurrent + at_w + dim, d_u, mask=mask)
        tl.store(grad_recurrent + at_w + 2 * dim, d_w, mask=mask)
        d_h -= d_h * scaled
        tl.debug_barrier()
        for first in tl.range(0, 3 * dim, SLICE, num_stages=1):
            part = first + tl.arange(0, SLICE)
            in_part = part < 3 * dim
            d_part = tl.load(
                grad_recurrent + row * 3 * dim + part[None, :],
                mask=running[:, None] & in_part[None, :],
                other=0.0,
            )
            in_weight = in_part[:, None] & inside[None, :]
            w = tl.load(weight + part[:, None] * dim + column[None, :], mask=in_weight, other=0.0)
            d_h = tl.dot(d_part, w, d_h, input_precision="ieee")


def run_forward(
    x: Tensor, attention: Tensor | None, weight: Tensor, bias: Tensor, offsets: Tensor, shift: Tensor | None
) -> list[Tensor]:
    """`jagged_recurrence.forward` of tensors on a GPU.

    Raises:
        TypeError: they are not of float32.
    """
    if weight.dtype != torch.float32:
        raise TypeError(f"the recurrence runs in float32 on a GPU, not in {weight.dtype}")
    x, weight, bias, offsets = (each.contiguous() for each in (x, weight, bias, offsets))
    dim, sequences = weight.shape[1], offsets.numel() - 1
    positions = x.shape[0] if attention is None else attention.shape[0]
    before, new, recurrent = (x.new_empty(positions, dim) for _ in range(3))
    gates = x.new_empty(positions, 2 * dim)
    out = x.new_empty(positions if attention is None else sequences, dim)
    launch(
        forward_kernel, x, attention, weight, bias, offsets, shift,
        out, before, gates, new, recurrent, sequences, dim,
        ATTENTION=attention is not None, SHIFT=shift is not None,
    )  # fmt: skip
    return [out, before, gates, new, recurrent]


def run_backward(
    grad: Tensor, attention: Tensor | None, weight: Tensor, offsets: Tensor, saved: list[Tensor]
) -> list[Tensor]:
    """`jagged_recurrence.backward` of tensors on a GPU."""
    grad, weight, offsets = (each.contiguous() for each in (grad, weight, offsets))
    before, gates, new, recurrent = saved
    positions, dim = before.shape
    grad_recurrent, grad_new = before.new_empty(positions, 3 * dim), before.new_empty(positions, dim)
    grad_attention = before.new_empty(0 if attention is None else positions)
    launch(
        backward_kernel, grad, attention, weight, before, gates, new, recurrent, offsets,
        grad_recurrent, grad_new, grad_attention, offsets.numel() - 1, dim,
        ATTENTION=attention is not None,
    )  # fmt: skip
    return [grad_recurrent, grad_new, grad_attention]


def launch(kernel: Any, *arguments: Any, **constants: bool) -> None:
    """Run a kernel on as many blocks as there are sequences for; the last two arguments are its sizes."""
    sequences, dim = arguments[-2:]
    if sequences:
        width = max(triton.next_power_of_2(dim), 16)
        blocks = triton.cdiv(sequences, BLOCK)
        kernel[(blocks,)](*arguments, **constants, BLOCK=BLOCK, WIDTH=width, SLICE=16, num_warps=warps(width))


def warps(width: int) -> int:
    """Of a block, so that its states stay in registers."""
    return min(max(width // 8, 4), 16)
