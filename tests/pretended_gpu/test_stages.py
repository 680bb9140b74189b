"""Every stage and option on a pretended GPU runs to its end; nothing in it would fail on a real one."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from mim_torchrec.benchmarks.rehearsal.budgets import STAGE_BUDGETS
from mim_torchrec.benchmarks.rehearsal.stages import STAGES, StageCounts, rehearse_stages
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow
RUNS = [(stage.name, ranks) for stage in STAGES for ranks in stage.ranks]


@cache
def rehearsed(ranks: int) -> list[dict[str, StageCounts]]:
    """What every rank has found."""
    with TemporaryDirectory() as name:
        return run_ranks(rehearse_stages, ranks, Path(name), ranks)


@pytest.mark.parametrize(("stage", "ranks"), RUNS, ids=str)
def test_a_stage_runs_to_its_end_on_the_gpu(stage, ranks):
    for rank in rehearsed(ranks):
        assert rank[stage].error is None
        assert rank[stage].totals["launches"] > 100


@pytest.mark.parametrize("kind", ["launches", "syncs", "uploads"])
@pytest.mark.parametrize(("stage", "ranks"), STAGE_BUDGETS, ids=str)
def test_a_step_of_a_stage_keeps_to_its_budget_which_has_no_room(stage, ranks, kind):
    taken = max(rank[stage].step[kind] for rank in rehearsed(ranks))
    budget = getattr(STAGE_BUDGETS[stage, ranks], kind)
    assert 0.95 * budget <= taken <= budget, (
        f"{taken} {kind} a step: lower the budget in budgets.py, or {stage}"
    )


@pytest.mark.parametrize(("stage", "ranks"), RUNS, ids=str)
def test_no_operator_mixes_devices_or_lacks_a_kernel(stage, ranks):
    for rank in rehearsed(ranks):
        assert (rank[stage].mixed, rank[stage].no_kernel) == ({}, {})
