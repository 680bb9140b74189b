"""A behavior model, kinds of features and a store from outside the package, through every stage.

The toys are modules in a folder of their own, which is put on the path: nothing of the package is touched.
"""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mim_torchrec.ciubm.ubm.registry import built_in_models, find_model
from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.evaluation import main as evaluate
from mim_torchrec.ctr.main import main as train
from mim_torchrec.data.features import Features
from mim_torchrec.data.schema import category_ids
from mim_torchrec.embeddings.stores.store import open_store
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.bundling import write_bundle
from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.inputs import inputs_of
from mim_torchrec.serving.messages import BadRequest, ScoreRequest
from mim_torchrec.serving.protocol import InferRequest, read_requests
from mim_torchrec.serving.scorer import Scorer
from tests.pipeline.test_ctr_main import SMALL, drop_columns
from tests.pipeline.test_evaluate_main import write_table
from tests.pipeline.test_features_main import write_features
from tests.serving import message
from tests.unit.test_packaging import ROOT, SOURCES

MODEL = '''
"""Behaviors weighted by how recent they are."""
from dataclasses import dataclass

import torch
from torch import nn

from mim_torchrec.ciubm.ubm.interface import Interest, UBMOptions, UserBehaviorModel


class Decay(UserBehaviorModel):
    def __init__(self, dim, decay):
        super().__init__()
        self.out_dim = dim
        self.decay = nn.Parameter(torch.tensor(decay))

    def forward(self, candidates, behaviors, pairs, context=None):
        weights = torch.exp(-self.decay * context.recency.to(behaviors.dtype).log1p())
        return Interest(pairs.weighted_sum(behaviors, weights[pairs.behavior_index]))


@dataclass(frozen=True, kw_only=True)
class DecayOptions(UBMOptions):
    """Options of Decay."""

    decay: float = 1.0
    """How fast behaviors are forgotten."""

    @property
    def needs(self):
        return frozenset({"recency"})

    def build(self, dim, *, dropout, auxiliary):
        return Decay(dim, self.decay)
'''

KINDS = '''
"""Hours on a circle, and prices in buckets."""
import math

import numpy as np
import pyarrow as pa
import torch

from mim_torchrec.data.features import Ids, Numbers


class Hour(Numbers):
    expected = "hours"
    width = 2

    def transform(self, numbers):
        angle = numbers * (2 * math.pi / 24)
        return torch.stack([angle.sin(), angle.cos()], dim=1)


class Bucket(Ids):
    expected = "prices"

    def accepts(self, value):
        return pa.types.is_floating(value)

    def read(self, values):
        return np.log2(1 + values.to_numpy(zero_copy_only=False)).astype(np.int64)
'''

STORE = '''
"""A table in a dictionary."""
import torch

from mim_torchrec.embeddings.stores.embedded import EmbeddedStore
from mim_torchrec.embeddings.table.reader import Table


class DictStore:
    opened = []

    def __init__(self, where, table_version):
        path = where.partition("://")[2]
        table = Table.open(path, table_version)
        self.table_version, self.dim, self.seq = table_version, table.manifest.dim, table.manifest.seq
        ids = table.row_index().ids
        vectors, _ = EmbeddedStore(table).lookup(ids)
        self.rows = dict(zip(ids.tolist(), vectors, strict=True))

    @classmethod
    def open(cls, where, table_version):
        cls.opened.append(where)
        return cls(where, table_version)

    def lookup(self, ids):
        found = [self.rows.get(item) for item in ids.tolist()]
        nothing = torch.zeros(self.dim)
        rows = torch.stack([nothing if row is None else row for row in found])
        return rows, torch.tensor([row is not None for row in found])

    def apply(self, window):
        self.rows |= dict(zip(window.ids.tolist(), window.vectors, strict=True))
        self.seq = window.seq
        return True
'''
OTHER = {"hour": "toy_kinds:Hour", "candidate_price": "toy_kinds:Bucket"}


@pytest.fixture(scope="module", autouse=True)
def outside(tmp_path_factory):
    """A folder on the path with the toys in it."""
    folder = tmp_path_factory.mktemp("outside")
    for name, source in {"toy_model": MODEL, "toy_kinds": KINDS, "toy_store": STORE}.items():
        (folder / f"{name}.py").write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, outside) -> Path:
    root = tmp_path_factory.mktemp("extensions")
    write_features(root / "data")
    write_table(root / "table", "styles")
    other = [word for feature in OTHER.items() for word in feature]
    train(["--data", str(root / "data"), "--table", str(root / "table"), "--out", str(root / "run"), *SMALL,
           "--ubm", "toy_model:DecayOptions", "--decay", "0.25", "--sparse-features", "candidate_brand",
           "--other-features", *other])  # fmt: skip
    evaluate(["--model", str(root / "run"), "--out", str(root / "evaluation"), "--draws", "0"])
    write_bundle(root / "run", root / "bundle")
    return root


def scorer(folder: Path, store: str) -> Scorer:
    return Scorer(Bundle.open(folder / "bundle"), store)


def sent(folder: Path) -> list[InferRequest]:
    """The test requests as clients send them, with the further columns."""
    found = []
    for row in pq.read_table(folder / "data" / "requests" / "test").to_pylist():
        request = message(row)
        for name, values, kind in (("candidate_brand", row["candidate_brand"], "BYTES"),
                                   ("candidate_price", row["candidate_price"], "FP64"),
                                   ("hour", [row["hour"]], "FP32")):  # fmt: skip
            tensor = {"name": name, "shape": [len(values)], "datatype": kind, "data": values}
            request["inputs"].append(tensor)
        found.append(InferRequest.model_validate(request))
    return found


def test_a_run_says_which_model_and_kinds_it_has(folder):
    config = json.loads((folder / "run" / "config.json").read_text())
    assert (config["ubm"], config["ubm_options"]) == ("toy_model:DecayOptions", {"decay": 0.25})
    assert config["other_features"] == OTHER


def test_evaluation_finds_the_model_and_the_kinds_again(folder):
    trained, again = (json.loads((folder / f / "metrics.json").read_text()) for f in ("run", "evaluation"))
    assert again["auc"] == pytest.approx(trained["auc"]) and trained["auc"] > 0.6
    assert again["unknown_ids"].keys() >= {"candidate_price"}


def test_a_bundle_has_a_table_of_a_kind_of_ids_and_the_parameters_of_the_model(folder):
    bundle = Bundle.open(folder / "bundle")
    assert "candidate_price" in bundle.tables and "hour" not in bundle.tables
    model, _ = bundle.load()
    assert "ciubm.ubm.decay" in dict(model.named_parameters())


def test_the_server_scores_as_the_trainer_does_with_all_three(folder):
    store = f"toy_store:DictStore://{folder / 'table'}"
    one = scorer(folder, store)
    requests = [read_requests(request, one, Limits())[0] for request in sent(folder)]
    found = torch.cat([scores.scores for scores in one.score(requests)]).numpy()
    expected = pq.read_table(folder / "evaluation" / "predictions.parquet")["score"].to_numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert type(one.mm).opened == [store]


def test_the_server_asks_for_what_the_model_and_the_kinds_need(folder):
    one = scorer(folder, str(folder / "table"))
    assert {"hour", "candidate_price", "candidate_brand"} <= inputs_of(one).keys()
    (request, *_) = sent(folder)
    (complete,) = read_requests(request, one, Limits())
    with pytest.raises(BadRequest, match="request_ts and behavior_ts"):
        one.score([ScoreRequest(ids=complete.ids, dense=complete.dense)])
    price = next(tensor for tensor in request.inputs if tensor.name == "candidate_price")
    price.datatype = "BYTES"
    with pytest.raises(BadRequest, match="candidate_price is BYTES, expected FP32, FP64"):
        read_requests(request, one, Limits())


def test_what_a_model_needs_is_looked_for_before_training(folder, tmp_path):
    data = drop_columns(folder / "data", tmp_path / "data", "behavior_ts")
    with pytest.raises(ValueError, match="--recency order.*missing: behavior_ts"):
        train(["--data", str(data), "--mim", "off", "--out", str(tmp_path / "run"), *SMALL,
               "--ubm", "toy_model:DecayOptions"])  # fmt: skip
    assert not (tmp_path / "run" / "vocabulary").exists()


def test_a_store_of_your_own_is_opened_with_a_version_only(folder):
    where = f"toy_store:DictStore://{folder / 'table'}"
    with pytest.raises(ValueError, match="say which table_version"):
        open_store(where)
    assert open_store(where, "styles").dim == 8


@pytest.mark.parametrize(
    "name, problem",
    [
        ("lstm", "take one of avg_pooling, bst"),
        ("toy_model:Missing", "'toy_model:Missing' cannot be loaded"),
        ("not_there:Model", "cannot be loaded .No module named 'not_there'.*PYTHONPATH"),
        ("toy_model:Decay", "is no UBMOptions"),
        ("toy_model:torch", "is no class"),
    ],
)
def test_a_model_that_is_not_there_is_refused_with_a_way_out(name, problem):
    with pytest.raises(ValueError, match=problem):
        find_model(name)


def test_a_kind_is_one_of_two_families():
    with pytest.raises(ValueError, match="neither Ids nor Numbers"):
        Features(other={"hour": "toy_model:Decay"})


def test_options_belong_to_their_model(tmp_path):
    with pytest.raises(ValueError, match="the options of din are DINOptions"):
        CTRConfig(data=tmp_path, out=tmp_path, ubm="din", ubm_options=find_model("sim")())


ADD = re.search(r"\n## To add .*?\n\n(\|.*?)\n\n", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)


def test_the_table_of_what_to_touch_names_files_that_there_are():
    paths = re.findall(r"`((?:mim_torchrec|embeddings|launch)/[\w/.]*)`", ADD[1])
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", built_in_models())
def test_only_its_own_file_names_a_behavior_model(name):
    own = built_in_models()[name].__module__
    default = {"mim_torchrec.ctr.config"} if name == CTRConfig.__dataclass_fields__["ubm"].default else set()
    naming = set()
    for module, path in SOURCES.items():
        # benchmarks compare models by name, and the public face of the room lists the paper's
        if module.startswith("mim_torchrec.benchmarks") or module == "mim_torchrec.ciubm":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = isinstance(node, ast.Constant) and node.value == name
            if names or (isinstance(node, ast.ImportFrom) and node.module == own):
                naming.add(module)
    assert naming - default == {own}


def test_the_categories_of_a_request_are_read_as_the_reader_does(folder):
    one = scorer(folder, str(folder / "table"))
    (row, *_) = pq.read_table(folder / "data" / "requests" / "test").to_pylist()
    (request, *_) = sent(folder)
    expected = category_ids(pa.array(row["candidate_categories"]))
    assert read_requests(request, one, Limits())[0].ids["candidate_category"].tolist() == expected.tolist()
