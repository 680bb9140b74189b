"""Plans without a GPU: bytes of each kind of memory, constraints, and what does not fit."""

import json

import pytest

from mim_torchrec.embeddings.plan import GIB, PlanConfig, main, simulate
from mim_torchrec.errors import OptionError

PAPER = {"rows": 1_170_000_000, "dim": 128}  # 300 GB as float16


@pytest.mark.parametrize(("world_size", "local"), [(8, 8), (100, 4)])
def test_the_papers_table_is_divided_over_the_memory_of_all_gpus(world_size, local):
    (frozen,) = simulate(PlanConfig(**PAPER, world_size=world_size, local_world_size=local))
    assert (frozen.sharding, frozen.kernel) == ("row_wise", "fused")
    assert sum(frozen.hbm) == frozen.bytes == PAPER["rows"] * 256
    assert max(frozen.hbm) <= -(-PAPER["rows"] // world_size) * 256 and len(frozen.hbm) == world_size
    assert not any(frozen.ddr) and frozen.optimizer_bytes == 0


@pytest.mark.parametrize(
    ("dtype", "row"), [("float32", 512), ("float16", 256), ("bfloat16", 256), ("int8", 136), ("int4", 68)]
)
def test_a_row_is_priced_as_it_is_stored(dtype, row):
    (frozen,) = simulate(PlanConfig(rows=10_000, dtype=dtype))
    assert frozen.bytes == 10_000 * row


def test_a_table_beyond_the_gpus_is_cached_from_host_memory():
    (frozen,) = simulate(PlanConfig(**PAPER, world_size=2, load_factor=0.1, memory="uvm_caching"))
    assert frozen.kernel == "fused_uvm_caching" and sum(frozen.ddr) == frozen.bytes
    assert max(frozen.hbm) == pytest.approx(0.1 * max(frozen.ddr), rel=1e-6)


def test_the_memory_asked_for_is_the_memory_planned():
    (frozen,) = simulate(PlanConfig(**PAPER, world_size=2, memory="uvm"))
    assert frozen.kernel == "fused_uvm" and not any(frozen.hbm)


def test_a_copy_a_node_takes_the_memory_of_every_node():
    (frozen,) = simulate(PlanConfig(rows=1_000_003, world_size=8, local_world_size=4, copy="node"))
    assert (frozen.sharding, frozen.kernel, frozen.copies) == ("data_parallel", "fused", 2)
    assert frozen.hbm == (250_001 * 256, 250_001 * 256, 250_001 * 256, 250_000 * 256) * 2
    assert frozen.bytes == 2 * 1_000_003 * 256


def test_a_copy_a_rank_takes_the_memory_of_every_rank():
    (frozen,) = simulate(PlanConfig(rows=1000, world_size=8, local_world_size=4, copy="rank"))
    assert frozen.hbm == (1000 * 256,) * 8 and frozen.copies == 8


def test_copies_that_do_not_fit_are_refused():
    with pytest.raises(OptionError, match="do not fit: the frozen one alone has 3,626 GiB.* --copy world"):
        simulate(PlanConfig(**PAPER, world_size=104, local_world_size=8, copy="node", memory="device",
                            hbm_gb=30))  # fmt: skip
    with pytest.raises(OptionError, match="--copy rank is in HBM"):
        simulate(PlanConfig(rows=1000, copy="rank", memory="uvm"))


def test_trainable_tables_stand_beside_it_with_their_optimizer():
    frozen, trained = simulate(PlanConfig(**PAPER, trainable=("100000000x64",)))
    assert (frozen.optimizer_bytes, trained.optimizer_bytes) == (0, 400_000_000)
    assert trained.bytes == 100_000_000 * 64 * 4


def test_what_does_not_fit_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match="do not fit: the frozen one alone has 279 GiB.* take more GPUs"):
        simulate(PlanConfig(**PAPER, world_size=2, memory="device"))


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"trainable": ("5",)}, "'5' is not ROWSxDIM"),
        ({"rows": 0}, "--rows is 0; it must be at least 1"),
        ({"world_size": 9}, "9 GPUs do not make machines of 8"),
    ],
)
def test_impossible_sizes_are_refused(wrong, problem):
    with pytest.raises(ValueError, match=problem):
        simulate(PlanConfig(**{"rows": 100} | wrong))


def test_the_command_prints_the_fullest_rank(capsys):
    main(["--rows", str(8 * GIB // 256), "--world-size", "8", "--trainable", "1000x16"])
    printed = capsys.readouterr().out
    assert "fullest of 8 ranks: 1.0 of 80 GiB of HBM" in printed and "trainable_0" in printed


def test_the_command_prints_json(capsys):
    main(["--rows", "1000", "--json", "True"])
    (frozen,) = json.loads(capsys.readouterr().out)
    assert frozen["bytes"] == 256_000


def test_an_impossible_size_is_refused():
    with pytest.raises(OptionError, match="--rows"):
        main(["--rows", "0"])
