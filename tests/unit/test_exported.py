"""The dense part of a bundle as a file of torch.export: the scorer's scores, without this package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mim_torchrec.benchmarks.speed.serving_inputs import InputConfig, make_bundle, make_request, make_table
from mim_torchrec.errors import OptionError
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.dense.exported import INPUTS, NAME, export_dense
from mim_torchrec.serving.scorer import Scorer

LENGTHS = ((3, 70), (1, 1), (2, 0), (5, 30))
LOADS = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
facts = {"inputs.json": ""}
program = torch.export.load(sys.argv[1], extra_files=facts).module()
names = [one["name"] for one in json.loads(facts["inputs.json"])["inputs"]]
given = load_file(sys.argv[2])
requests = sorted({name.split("/")[0] for name in given})
save_file({k: program(*(given[f"{k}/{name}"] for name in names))[0] for k in requests}, sys.argv[3])
assert not [name for name in sys.modules if name.startswith(("mim_torchrec", "torchrec", "fbgemm"))]
"""


def rows_of(scorer: Scorer, request, facts: dict) -> dict[str, torch.Tensor]:
    """What a caller looks up."""
    found = {}
    for one in facts["inputs"]:
        name = one["name"]
        if one["kind"] == "times":
            times = torch.tensor([request.request_ts]) if name == "request_ts" else request.behavior_ts
            found[name] = times
        elif one["kind"] == "vector":
            found[name] = scorer.mm.lookup(request.ids[name.replace("_mm", "_item_id")])[0]
        else:
            table = name.removeprefix("candidate_").removeprefix("behavior_")
            rows, known = scorer.lookups.tables[table].lookup(request.ids[name])
            rows[~known] = scorer.lookups.unknown[table]
            found[name] = rows
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[InputConfig, Path]:
    config = InputConfig(out=tmp_path_factory.mktemp("exported"), behaviors=(70,), candidates=5, mm_dims=(8,),
                         id_dim=4, items=60, users=5)  # fmt: skip
    return config, make_table(config)


@pytest.mark.parametrize(
    "model", ["avg_pooling/recommended", "din/paper", "bst/recommended", "sim/paper", "twin/recommended"]
)
def test_the_exported_file_gives_the_scores_of_the_scorer(model, made):
    config, table = made
    bundle = Bundle.open(make_bundle(config, model))
    export_dense(bundle, bundle.path / NAME)
    scorer, extra = Scorer(bundle, table), {INPUTS: ""}
    program = torch.export.load(bundle.path / NAME, extra_files=extra).module()
    facts = json.loads(extra[INPUTS])
    assert facts["model_version"] == bundle.model_version and facts["table_version"] == "random"
    names, given, expected = [one["name"] for one in facts["inputs"]], {}, {}
    for k, (candidates, behaviors) in enumerate(LENGTHS):
        request = make_request(config, behaviors, k)
        ids = {name: ids[:candidates] if name.startswith("candidate") else ids
               for name, ids in request.ids.items()}  # fmt: skip
        ids["candidate_item_id"][0] = 10**9  # unknown
        ids["behavior_item_id"][:2] = ids["behavior_item_id"][-1:]
        request.ids.update(ids)
        rows = rows_of(scorer, request, facts)
        expected[str(k)] = scorer.score([request])[0].scores
        (found,) = program(*(rows[name] for name in names))
        torch.testing.assert_close(found, expected[str(k)], rtol=0, atol=1e-5)
        given |= {f"{k}/{name}": value.contiguous() for name, value in rows.items()}
    if model.startswith("sim"):
        save_file(given, config.out / "given")
        words = [str(bundle.path / NAME), str(config.out / "given"), str(config.out / "found")]
        subprocess.run([sys.executable, "-c", LOADS, *words], check=True)
        elsewhere = load_file(config.out / "found")
        for k, scores in expected.items():
            torch.testing.assert_close(elsewhere[k], scores, rtol=0, atol=1e-5)


def test_a_model_that_steps_through_histories_is_refused(made):
    config, _ = made
    bundle = Bundle.open(make_bundle(config, "dien/paper"))
    with pytest.raises(OptionError, match="dien cannot be written by torch.export; avg_pooling"):
        export_dense(bundle, bundle.path / NAME)
    assert not (bundle.path / NAME).exists()
