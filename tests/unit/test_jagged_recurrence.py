"""The recurrences of DIEN on a GPU: operators against the loops of a CPU, kernels against the operators."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mim_torchrec.ciubm import recurrence_kernels
from mim_torchrec.ciubm.ubm.dien import DIEN
from tests.histories import make_case

REQUESTS = [
    ((2, 3, 1, 1, 2), (3, 0, 1, 9, 5)),
    ((1, 0, 2), (2, 7, 3)),
    ((1, 2), (0, 0)),
]


@pytest.mark.parametrize(("num_candidates", "num_behaviors"), REQUESTS, ids=str)
def test_all_steps_at_once_are_the_steps_of_a_cpu_with_their_gradients(num_candidates, num_behaviors):
    torch.manual_seed(2)
    model = DIEN(8).double()
    case = make_case(num_candidates, num_behaviors)
    found = []
    for evolve in (model._evolve, model._evolve_at_once):
        leaves = [x.clone().requires_grad_() for x in (case.candidates, case.behaviors)]
        results = evolve(*leaves, case.pairs)
        model.zero_grad()
        sum((out * torch.arange(out.numel()).view_as(out).sin()).sum() for out in results).backward()
        gradients = [p.grad for p in model.parameters()]
        found.append([*results, *(leaf.grad for leaf in leaves), *gradients])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


def test_the_kernels_are_the_operators_of_a_cpu():
    run = subprocess.run(
        [sys.executable, "-m", "tests.interpreted_kernels"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) == 6 and all(len(of_case) == 8 for of_case in found.values())
    assert max(max(of_case) for of_case in found.values()) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel"])
def test_the_kernels_compile_for_a_gpu_and_need_little_of_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(recurrence_kernels, name)
    constants = {
        "ATTENTION": True,
        "SHIFT": True,
        "BLOCK": recurrence_kernels.BLOCK,
        "WIDTH": 32,
        "SLICE": 16,
    }
    kinds = {"num_sequences": "i32", "dim": "i32", "offsets": "*i64", "shift": "*i64"} | dict.fromkeys(
        constants, "constexpr"
    )
    source = ASTSource(
        fn=kernel,
        signature={argument: kinds.get(argument, "*fp32") for argument in kernel.arg_names},
        constexprs={(k,): constants[one] for k, one in enumerate(kernel.arg_names) if one in constants},
    )
    options = {"num_warps": recurrence_kernels.warps(constants["WIDTH"])}
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    assert compiled.asm["cubin"] and compiled.metadata.shared < 48 * 1024
