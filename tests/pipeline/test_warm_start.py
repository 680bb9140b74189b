"""`mim ctr --warm-start` through its `main`: known ids keep their embeddings, new ones begin."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from mim_torchrec.ctr.main import main
from mim_torchrec.ctr.warm_start import WarmStartError
from mim_torchrec.data.schema import REQUESTS
from mim_torchrec.data.vocabulary import Vocabulary
from mim_torchrec.errors import OptionError
from mim_torchrec.training.history import read_history
from tests.pipeline.test_ctr_main import SMALL, write_dataset
from tests.pipeline.test_evaluate_main import write_table
from tests.ranks import run_ranks

TABLE = "item_embeddings.embeddings.item_id.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("warm")
    write_dataset(root / "monday")
    write_dataset(root / "tuesday")  # the same shop, with users and items that monday has not seen
    for split in ("train", "validation", "test"):
        (file,) = (root / "tuesday" / "requests" / split).iterdir()
        rows = pq.read_table(file).to_pylist()
        for row in rows:
            row["user_id"] -= 3
            row["candidate_item_ids"][0] = 5 if row["request_id"] % 2 else 999_999
        pq.write_table(pa.Table.from_pylist(rows, schema=REQUESTS), file)
    items = pq.read_table(next((root / "tuesday" / "items").iterdir())).to_pylist()
    more = [{**items[0], "item_id": item} for item in (5, 999_999)]
    table = pa.Table.from_pylist([*items, *more])
    pq.write_table(table, next((root / "tuesday" / "items").iterdir()))
    write_table(root / "table", "styles")
    main([*words(root, "monday"), "--out", str(root / "first")])
    return root


def words(root: Path, day: str) -> list[str]:
    return ["--data", str(root / day), "--table", str(root / "table"), *SMALL]


def embeddings(run: Path, vocabulary: str = "item_id") -> dict[int, list[float]]:
    """Embeddings of a run by id; 0 is the row of unknown ids."""
    name = TABLE.replace("item_id", vocabulary) if vocabulary != "user_id" else (
        "request_embeddings.embedding_bags.user_id.weight"
    )  # fmt: skip
    weights = weights_of(run, name)
    ids = [0, *Vocabulary.load(run / "vocabulary" / f"{vocabulary}.npz").ids.tolist()]
    return dict(zip(ids, weights.tolist(), strict=True))


def weights_of(run: Path, name: str) -> torch.Tensor:
    weights = torch.empty(FileSystemReader(run / "best").read_metadata().state_dict_metadata[name].size)
    dcp.load({name: weights}, checkpoint_id=str(run / "best"))
    return weights


FROZEN = ["--lr", "0", "--sparse-lr", "0", "--epochs", "1"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("vocabulary", ["item_id", "user_id"])
def test_known_ids_keep_their_embeddings_and_new_ones_begin(folder, tmp_path, ranks, vocabulary):
    out = tmp_path / "second"
    command = [*words(folder, "tuesday"), "--out", str(out), *FROZEN, "--warm-start", str(folder / "first")]
    run_ranks(main, ranks, command)
    before, after = (embeddings(run, vocabulary) for run in (folder / "first", out))
    assert set(before) < set(after)
    for key, row in before.items():
        assert after[key] == row
    fresh = tmp_path / "fresh"
    main([*words(folder, "tuesday"), "--out", str(fresh), *FROZEN])
    begun = embeddings(fresh, vocabulary)
    both = (set(before) & set(begun)) - {0}
    assert both and not any(np.allclose(begun[key], before[key]) for key in both)
    assert {5, 999_999} <= set(after) or vocabulary == "user_id"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_bounded_table_leaves_rare_ids_behind(folder, tmp_path, ranks):
    out, bound = tmp_path / "second", ["--max-ids", "item_id", "12", "--count-decay", "0"]
    command = [*words(folder, "tuesday"), "--out", str(out), *FROZEN, "--warm-start", str(folder / "first")]
    run_ranks(main, ranks, [*command, *bound])
    before, after = (embeddings(run) for run in (folder / "first", out))
    assert len(after) == 1 + 12 < len(before)
    stayed = before.keys() & after.keys()
    assert {0} < stayed < before.keys() and {5, 999_999} <= after.keys() - stayed
    assert all(after[key] == before[key] for key in stayed)


def test_a_limit_of_no_table_is_refused(folder, tmp_path):
    with pytest.raises(OptionError, match="--max-ids item: there is no such table of ids; .* item_id"):
        main([*words(folder, "monday"), "--out", str(tmp_path / "out"), "--max-ids", "item", "12"])


def test_without_training_it_predicts_what_the_earlier_model_predicts(folder, tmp_path):
    main([*words(folder, "monday"), "--out", str(tmp_path / "again"), *FROZEN,
          "--warm-start", str(folder / "first")])  # fmt: skip
    runs = (folder / "first", tmp_path / "again")
    scores = [pq.read_table(run / "predictions.parquet")["score"].to_numpy() for run in runs]
    # running statistics of batch normalization moved on by an epoch
    assert np.corrcoef(*scores)[0, 1] > 0.98


@pytest.mark.parametrize(
    "way", [("--id-shrinkage", "30", "--normalize-ids", "False"), ("--preset", "recommended")]
)
def test_shrunk_embeddings_begin_as_they_ended_though_counts_have_grown(folder, tmp_path, way):
    shrink = ["--mim", "off", "--min-count", "3", *way]
    for day, out, more in (("monday", "first", ()), ("tuesday", "second", FROZEN)):
        begun = ["--warm-start", str(tmp_path / "first")] if more else []
        main(["--data", str(folder / day), *SMALL, *shrink, *more, *begun, "--out", str(tmp_path / out)])
    for name in ("item_id", "user_id"):
        found = []
        for out in (tmp_path / "first", tmp_path / "second"):
            vocabulary = Vocabulary.load(out / "vocabulary" / f"{name}.npz")
            factors = vocabulary.factors(torch.arange(len(vocabulary.ids) + 1))
            rows = embeddings(out, name)
            found.append({key: (factor, np.array(rows[key]))
                          for key, factor in zip(rows, factors.tolist(), strict=True)})  # fmt: skip
        before, after = found
        assert any(after[key][0] > factor > 0 for key, (factor, _) in before.items())
        for key, (factor, row) in before.items():
            np.testing.assert_allclose(after[key][0] * after[key][1], factor * row, rtol=1e-5, atol=1e-9)
    if "recommended" in way:  # the tower's scales have changed, and it is the same function
        (scale, weight), (later, other) = (
            [weights_of(tmp_path / out, f"tower.layers.{name}") for name in ("0.scale", "1.weight")]
            for out in ("first", "second")
        )
        assert not torch.allclose(later, scale)
        torch.testing.assert_close(later * other, scale * weight)


def test_training_goes_on_from_there(folder, tmp_path):
    losses = {}
    for name, more in (("warm", ["--warm-start", str(folder / "first")]), ("cold", [])):
        main([*words(folder, "tuesday"), "--out", str(tmp_path / name), "--epochs", "1", *more])
        history = asdict(read_history(tmp_path / name / "history.jsonl"))
        losses[name] = np.mean([entry["loss"] for entry in history["steps"]])
    assert losses["warm"] < losses["cold"]


def test_another_model_is_refused_by_what_differs(folder, tmp_path):
    with pytest.raises(WarmStartError, match=r"of another model: ubm 'din' \(now 'avg_pooling'\)"):
        main([*words(folder, "tuesday"), "--out", str(tmp_path), "--ubm", "avg_pooling",
              "--warm-start", str(folder / "first")])  # fmt: skip


def test_vectors_of_another_encoder_are_refused(folder, tmp_path):
    write_table(tmp_path / "other", "another")
    with pytest.raises(WarmStartError, match="vectors of version styles, the table has another"):
        main([*words(folder, "tuesday"), "--out", str(tmp_path / "out"), "--table", str(tmp_path / "other"),
              "--warm-start", str(folder / "first")])  # fmt: skip


def test_a_folder_that_is_no_run_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="is no run: it has no config.json"):
        main([*words(folder, "tuesday"), "--out", str(tmp_path / "out"), "--warm-start", str(tmp_path)])
