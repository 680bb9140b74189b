"""Stages that a benchmark computes, in the words of a pipeline."""

import json
from pathlib import Path

import pytest

from mim_torchrec.benchmarks.harness import stages
from mim_torchrec.benchmarks.harness.stages import Run, Stage
from mim_torchrec.benchmarks.paper import demo, films, movielens, shop
from mim_torchrec.pipeline.execution import StageError
from mim_torchrec.pipeline.spec import Pipeline
from mim_torchrec.pipeline.submission import shown


def test_a_stage_is_described_with_its_ranks_threads_and_inputs(tmp_path):
    data = Stage(name="data", command=("shop",), out=tmp_path / "data")
    made = Stage(name="x", command=("ctr",), out=tmp_path / "ctr" / "x", ranks="1x2", after=(data,),
                 options={"data": data.out, "out": tmp_path / "ctr" / "x", "mim": "off", "seed": 3},
                 )  # fmt: skip
    described = made.described(tmp_path, threads=1)
    assert (described.component, described.job.j, described.out) == ("mim.ctr", "1x2", "ctr/x")
    assert described.job.env == {"OMP_NUM_THREADS": "1"}
    assert described.after == ["data"]
    assert described.flags == {"data": str(data.out), "mim": "off", "seed": 3}
    assert shown(described).startswith(f"mim.ctr -j 1x2 --data {data.out} --mim off")


def test_a_path_with_a_dollar_is_no_reference(tmp_path):
    made = Stage(name="x", command=("table", "permute"), out=tmp_path / "x", arguments=(Path("${home}/t"),))
    described = made.described(tmp_path, None)
    assert described.arguments == ["$${home}/t"]
    Pipeline(name="test", stages={"x": described})


def test_a_stage_outside_the_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="outside"):
        Run(tmp_path / "run").run([Stage(name="a", command=("shop",), out=tmp_path / "elsewhere")])


def test_data_from_outside_the_run_is_a_file_that_is_read(tmp_path):
    data = Stage(name="data", command=("shop",), out=tmp_path / "data", files=(tmp_path / "data" / "d.json",))
    made = Stage(name="x", command=("ctr",), out=tmp_path / "run" / "x", after=(data,))
    described = made.described(tmp_path / "run", None)
    assert (described.after, described.files) == ([], [str(tmp_path / "data" / "d.json")])


def test_groups_of_stages_run_and_are_kept(tmp_path, capfd):
    sizes = shop.ShopSizes(items=150, users=10, requests=20, searches=10)
    first = shop.shop_stage(sizes, tmp_path.resolve(), "one", 1.0)
    second = Stage(name="info", command=("table", "verify"), arguments=(first.out,), out=tmp_path / "no",
                   after=(first,))  # fmt: skip
    run = Run(tmp_path)
    run.run([first], threads=1)
    with pytest.raises(StageError, match="stage info failed"):
        run.run([second], threads=2)
    said = capfd.readouterr().out
    assert said.count("one: started") == 1 and "one: already there" not in said
    again = Run(tmp_path)
    again.run([first], threads=1)
    assert again.seconds == run.seconds and "one: already there" in capfd.readouterr().out


def test_the_version_of_a_table_is_stated_to_the_stage_that_reads_it(tmp_path):
    table = Stage(name="t", command=("export",), out=tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"table_version": "v7"}))
    data = Stage(name="d", command=("shop",), out=tmp_path / "d")
    made = stages.ctr_stage("mim", root=tmp_path, data=data, table=table, seed=0, options={}, ranks="1x1")
    assert made.options["table-version"] == "v7"


def test_the_file_of_the_demo_has_the_settings_of_the_other_experiments(tmp_path):
    config = demo.DemoConfig(items=7, users=8, requests=9, candidates=2, searches=3, csft_epochs=4,
                             csft_batch_size=5, ctr_epochs=6, nproc=3, seed=11)  # fmt: skip
    found = demo.describe(config).stages
    data = shop.shop_stage(config, tmp_path, "shop", 1.0)
    encoder = shop.csft_stage(config, tmp_path, "csft", data)
    assert found["shop"] == data.described(tmp_path, None).model_copy(update={"out": None})
    other = encoder.described(tmp_path, None)
    assert found["csft"].flags == other.flags | {"data": "${shop}"}
    assert found["csft"].job == other.job
    for name, stage in found.items():
        if name.startswith("ctr-"):
            assert stage.flags.items() >= (shop.CTR | {"epochs": 6, "seed": 11}).items()
            assert stage.job.j == "1x3"
    plain = found["export-table-plain"].flags
    assert (plain["encoder"], plain["image-size"]) == (shop.PLAIN, shop.PLAIN_OPTIONS["image-size"])
    assert found["table-permuted"].flags == {"seed": 12}


def test_the_file_of_films_has_the_settings_that_its_report_states(tmp_path):
    config = movielens.MovieLensConfig(data=tmp_path / "films", out=tmp_path / "run", seeds=(4, 5))
    job = movielens.Job(config)
    root, found = job.root, job.pipeline.stages
    assert {name for name in job.ctr if name[-1] == "5"} == {"base-5", "mim-5", "permuted-5", "plain-5"}
    for split in ("user", "global"):
        data = films.import_stage(config.data, root, split)
        made = data.described(root, 1)
        assert found[data.name].model_dump() == made.model_dump()
        encoder = films.csft_stage(root, data).described(root, 1)
        assert found[f"csft-movielens-{split}"].flags == encoder.flags | {"data": f"${{import-{split}}}"}
    no_style = shop.shop_stage(movielens.NO_STYLE_SHOP, root, "shop-no-style", 0.0)
    assert found["shop-no-style"].flags == no_style.described(root, 1).flags
    encoder = shop.csft_stage(movielens.NO_STYLE_SHOP, root, "csft-shop-no-style", no_style).described(
        root, 1
    )
    assert found["csft-shop-no-style"].flags == encoder.flags | {"data": "${shop-no-style}"}
    for kind in ("base", "mim"):
        for number, setting in enumerate(films.GRID):
            flags = found[f"ctr-tune-{kind}-{number}"].flags
            assert flags.items() >= (movielens.CTR | setting | {"seed": 1000}).items()
    for name in job.ctr:
        flags = found[f"ctr-{name}"].flags
        assert flags.items() >= movielens.CTR.items()
        assert flags["seed"] == (1000 if "tune" in name else 4 if name[-1] not in "45" else int(name[-1]))
    assert found["export-table-plain"].flags["image-size"] == movielens.PLAIN_OPTIONS["image-size"]
    assert {stage.job.env["OMP_NUM_THREADS"] for name, stage in found.items() if "choose" not in name} == {
        "1"
    }
    assert {stage.job.j for stage in found.values() if stage.component} == {"1x1"}


def test_a_tuning_seed_is_not_reported(tmp_path):
    with pytest.raises(ValueError, match="seed 1000 is for tuning"):
        movielens.Job(movielens.MovieLensConfig(data=tmp_path, seeds=(1000,)))
