"""Run the Triton kernels of the recurrence in Triton's interpreter, beside their form on a CPU.

Prints the largest differences of results and gradients by case, as JSON. A process decides on the interpreter
when it imports Triton, so this is a program: TRITON_INTERPRET=1 python -m tests.interpreted_kernels
"""

import json

import torch

from mim_torchrec.ciubm import recurrence_kernels
from mim_torchrec.ciubm.ubm import jagged_recurrence

CASES = {
    "gru": (4, (3, 0, 1, 5), False),
    "gru of several blocks": (16, tuple(k % 4 for k in range(35)), False),
    "augru": (20, (2, 6, 0, 1), True),
    "augru of several blocks": (3, tuple(k % 3 for k in range(18)), True),
    "without sequences": (4, (), True),
    "without positions": (4, (0, 0), True),
}
"""A dimension, the lengths of sequences, and whether they pay attention."""


def differences(dim: int, lengths: tuple[int, ...], attends: bool) -> list[float]:
    """Of everything that the two operators return."""
    torch.manual_seed(0)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    positions = sum(lengths)
    x, weight, bias = torch.randn(positions, 3 * dim), torch.randn(3 * dim, dim), torch.randn(3 * dim)
    attention = shift = None
    if attends:  # all read the inputs of the longest
        attention, shift = torch.rand(positions), -offsets[:-1]
        x = x[: max(lengths, default=0)]
    first = x, attention, weight, bias, offsets, shift
    expected, found = jagged_recurrence.forward(*first), recurrence_kernels.run_forward(*first)
    second = torch.randn_like(expected[0]), attention, weight, offsets, expected[1:]
    expected += jagged_recurrence.backward(*second)
    found += recurrence_kernels.run_backward(*second)
    pairs = list(zip(expected, found, strict=True))
    assert all(one.shape == other.shape for one, other in pairs)
    return [float((one - other).abs().max()) if one.numel() else 0.0 for one, other in pairs]


if __name__ == "__main__":
    print(json.dumps({name: differences(*case) for name, case in CASES.items()}))
