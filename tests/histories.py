"""Small batches of requests for the user behavior models, and their plain loops over requests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ciubm.ubm.interface import BehaviorContext, Interest

CANDIDATES, BEHAVIORS = (2, 3, 1, 1, 2), (3, 0, 1, 9, 5)


def offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@dataclass(frozen=True)
class Case:
    """A batch: what a model is called with."""

    num_candidates: tuple[int, ...]
    num_behaviors: tuple[int, ...]
    candidates: Tensor
    behaviors: Tensor
    context: BehaviorContext

    @property
    def pairs(self) -> RequestPairs:
        return RequestPairs.build(offsets(self.num_candidates), offsets(self.num_behaviors))

    def requests(self) -> list[tuple[list[int], list[int]]]:
        """Candidates and behaviors of each request."""
        out, c, b = [], 0, 0
        for n, m in zip(self.num_candidates, self.num_behaviors, strict=True):
            out.append((list(range(c, c + n)), list(range(b, b + m))))
            c, b = c + n, b + m
        return out

    def run(self, model: nn.Module) -> Interest:
        return model(self.candidates, self.behaviors, self.pairs, self.context)

    def select(self, chosen: Sequence[tuple[list[int], list[int]]]) -> "Case":
        """The batch of these requests, each given by its candidates and behaviors."""
        c = [t for candidates, _ in chosen for t in candidates]
        b = [i for _, behaviors in chosen for i in behaviors]
        context = BehaviorContext(
            self.context.recency[b], self.context.candidate_categories[c], self.context.behavior_categories[b]
        )
        sizes = [tuple(len(part) for part in parts) for parts in zip(*chosen, strict=True)]
        return Case(*sizes, self.candidates[c], self.behaviors[b], context)

    def with_gradient(self) -> "Case":
        leaves = (x.clone().requires_grad_() for x in (self.candidates, self.behaviors))
        return replace(self, **dict(zip(("candidates", "behaviors"), leaves, strict=True)))


def make_case(
    num_candidates: Sequence[int] = CANDIDATES,
    num_behaviors: Sequence[int] = BEHAVIORS,
    dim: int = 8,
    dtype: torch.dtype = torch.float64,
) -> Case:
    generator = torch.Generator().manual_seed(0)
    c, b = sum(num_candidates), sum(num_behaviors)
    return Case(
        tuple(num_candidates),
        tuple(num_behaviors),
        torch.randn(c, dim, generator=generator, dtype=dtype),
        torch.randn(b, dim, generator=generator, dtype=dtype),
        BehaviorContext(
            recency=torch.rand(b, generator=generator, dtype=torch.float64).mul(14).exp(),
            candidate_categories=torch.randint(0, 4, (c,), generator=generator),
            behavior_categories=torch.randint(0, 4, (b,), generator=generator),
        ),
    )


def naive_value(
    case: Case, interest: Callable[[Tensor, Tensor, list[int], int], Tensor], width: int
) -> Tensor:
    """The interest of one candidate after the other; zeros without behaviors.

    Args:
        case: the batch.
        interest: of a candidate, the behaviors of its request, their numbers, and the candidate's number.
        width: size of the interest.
    """
    rows = []
    for candidates, behaviors in case.requests():
        for t in candidates:
            none = case.candidates.new_zeros(width)
            rows.append(
                interest(case.candidates[t], case.behaviors[behaviors], behaviors, t) if behaviors else none
            )
    return torch.stack(rows)


def assert_same_with_gradients(
    case: Case, model: nn.Module, naive: Callable[[Case], Tensor], atol: float = 1e-9
) -> None:
    """The model's value, and its gradients by inputs and parameters, are those of the naive form."""
    case = case.with_gradient()
    wanted = [case.candidates, case.behaviors, *model.parameters()]
    expected, actual = naive(case), case.run(model).value
    torch.testing.assert_close(actual, expected, atol=atol, rtol=atol)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected.dtype)
    for a, e in zip(
        torch.autograd.grad((actual * upstream).sum(), wanted, allow_unused=True),
        torch.autograd.grad((expected * upstream).sum(), wanted, allow_unused=True),
        strict=True,
    ):
        none = torch.zeros(())
        torch.testing.assert_close(none if a is None else a, none if e is None else e, atol=atol, rtol=atol)
