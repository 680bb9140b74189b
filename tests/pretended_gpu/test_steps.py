"""A training step of every CTR model on a pretended GPU: its losses, and what it may take."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from mim_torchrec.benchmarks.rehearsal.budgets import BUDGETS
from mim_torchrec.benchmarks.rehearsal.steps import CASES, StepCounts, measure_step
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow
KINDS = ("launches", "syncs", "uploads", "asides")
ROOM = 0.95
"""Fraction of its budget above which a count is."""


def measure(folder: Path, ranks: int) -> dict[str, tuple[StepCounts, list[str], list[float]]]:
    """Of every model on this many ranks: a step on the GPU, what fails, and losses on the CPU."""
    found = {}
    for case in CASES:
        if case.ranks == ranks:
            step, counts = measure_step(case, folder)
            on_cpu, _ = measure_step(case, folder, on_gpu=False)
            found[case.name] = step, [*counts.mixed, *counts.no_kernel], on_cpu.losses
    return found


@cache
def measured(ranks: int) -> dict[str, list[tuple[StepCounts, list[str], list[float]]]]:
    """What every rank has found, by model."""
    with TemporaryDirectory() as name:
        of_ranks = run_ranks(measure, ranks, Path(name), ranks)
    return {case: [rank[case] for rank in of_ranks] for case in of_ranks[0]}


every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
def test_nothing_in_a_step_would_fail_on_a_gpu(case):
    assert [problem for _, problems, _ in measured(case.ranks)[case.name] for problem in problems] == []


@every_case
def test_losses_are_those_of_the_cpu(case):
    for step, _, on_cpu in measured(case.ranks)[case.name]:
        assert len(step.losses) > 2
        # DIEN draws what it compares with after tables have drawn, which the planner divides otherwise there
        near = 1e-2 if case.ubm == "dien" and case.ranks > 1 else 1e-4
        torch.testing.assert_close(step.losses, on_cpu, rtol=near, atol=1e-5)


@every_case
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_keeps_to_its_budget_which_has_no_room(case, kind):
    most = max(getattr(step, kind) for step, _, _ in measured(case.ranks)[case.name])
    budget = getattr(BUDGETS[case.name], kind)
    assert most <= budget, f"{case.name} takes {most} {kind} a step, its budget is {budget}"
    lower = f"{case.name} takes {most} {kind} a step: lower its budget of {budget} in rehearsal/budgets.py"
    assert most >= int(ROOM * budget), lower


def test_every_model_has_a_budget():
    assert list(BUDGETS) == [case.name for case in CASES]
