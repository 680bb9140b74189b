"""Weights multiply the loss: those of requests (`weight`) or of candidates (`candidate_weights`)."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from mim_torchrec.ctr.task import global_mean_loss
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.features import Features
from mim_torchrec.errors import OptionError
from tests.datasets import request_rows, write_requests
from tests.request_rows import as_rows, expected, read


def weighted(path, values, *more):
    """The default requests with a column of weights."""
    name = "candidate_weights" if pa.types.is_list(values.type) else "weight"
    table = pq.read_table(write_requests(path))
    table = table.append_column(name, values)
    for other in more:
        table = table.append_column(*other)
    pq.write_table(table, path, row_group_size=4)
    return path


def of_candidates(rows) -> list[list[float]]:
    return [[0.5 + k + 10 * c for c in range(len(row["labels"]))] for k, row in enumerate(rows)]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.decimal128(8, 2)], ids=str)
def test_weights_of_candidates_stay_with_them(tmp_path, kind, shuffle):
    rows = request_rows()
    file = weighted(tmp_path / "r.parquet", pa.array(of_candidates(rows)).cast(pa.list_(kind)))
    by_request = dict(zip((row["request_id"] for row in rows), of_candidates(rows), strict=True))
    batches = read([file], shuffle=shuffle, batch_size=5)
    assert len(batches) > 2
    for batch in batches:
        wanted = [by_request[request] for request in batch.request_ids.tolist()]
        assert batch.weights.tolist() == sum(wanted, [])
    assert sorted(row["request_id"] for row in as_rows(batches)) == sorted(by_request)


def test_a_weight_of_a_request_is_that_of_all_its_candidates(tmp_path):
    rows = request_rows()
    file = weighted(tmp_path / "r.parquet", pa.array([float(k) for k in range(12)]))
    found = [weight for batch in read([file]) for weight in batch.weights.tolist()]
    assert found == [float(k) for k, row in enumerate(rows) for _ in row["labels"]]


def test_without_the_column_there_are_no_weights(tmp_path):
    assert all(batch.weights is None for batch in read([write_requests(tmp_path / "r.parquet")]))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), None])
def test_a_weight_that_is_none_is_refused_or_skipped(tmp_path, value):
    file = weighted(tmp_path / "r.parquet", pa.array([1.0] * 5 + [value] + [1.0] * 6))
    with pytest.raises(DataError, match="row group 1, row 1, column weight: "):
        read([file])
    rows = request_rows()
    assert as_rows(read([file], on_bad_row="skip")) == expected([*rows[:5], *rows[6:]])


def test_weights_of_another_length_than_the_candidates_are_refused(tmp_path):
    values = of_candidates(request_rows())
    values[6] = values[6][:-1] + [1.0, 1.0]
    file = weighted(tmp_path / "r.parquet", pa.array(values))
    with pytest.raises(DataError, match="row 2, column candidate_weights: its length is not that of"):
        read([file])


def test_weights_of_text_are_refused(tmp_path):
    file = weighted(tmp_path / "r.parquet", pa.array(["1"] * 12))
    with pytest.raises(DataError, match=r"column weight: expected one number a request; found string"):
        read([file])


def test_weights_of_requests_and_of_candidates_are_not_mixed(tmp_path):
    lists = ("candidate_weights", pa.array(of_candidates(request_rows())))
    file = weighted(tmp_path / "r.parquet", pa.array([1.0] * 12), lists)
    with pytest.raises(DataError, match="column candidate_weights: is there beside weight"):
        read([file])


def test_weights_in_one_file_only_are_refused(tmp_path):
    files = [weighted(tmp_path / "a.parquet", pa.array([1.0] * 12)), write_requests(tmp_path / "b.parquet")]
    with pytest.raises(DataError, match=r"b\.parquet: has columns"):
        read(files)


def test_a_weight_is_no_feature():
    with pytest.raises(OptionError, match="weight: requests have it anyway"):
        Features(dense=("weight",))


def test_a_batch_keeps_its_weights_on_the_way_to_a_device(tmp_path):
    file = weighted(tmp_path / "r.parquet", pa.array([float(k) for k in range(12)]))
    batch = read([file])[0]
    assert batch.to(torch.device("cpu")).weights.tolist() == batch.weights.tolist()


def test_the_loss_is_the_weighted_mean():
    logits = torch.tensor([0.3, -1.2, 2.0, 0.0])
    labels, weights = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([1.0, 10.0, 0.0, 2.5])
    each = [float(F.binary_cross_entropy_with_logits(x, y)) for x, y in zip(logits, labels, strict=True)]
    naive = sum(w * loss for w, loss in zip(weights.tolist(), each, strict=True)) / 13.5
    assert float(global_mean_loss(logits, labels, 1, weights)) == pytest.approx(naive, rel=1e-6)
    plain = global_mean_loss(logits, labels, 1)
    assert torch.equal(plain, global_mean_loss(logits, labels, 1, torch.ones(4)))
    assert float(global_mean_loss(logits, labels, 1, torch.zeros(4))) == 0.0


def test_repeating_a_sample_equals_its_weight():
    logits = torch.tensor([0.3, -1.2, 2.0], requires_grad=True)
    labels = torch.tensor([1.0, 0.0, 0.0])
    index = torch.tensor([0, 1, 1, 1, 2, 2])
    (repeated,) = torch.autograd.grad(global_mean_loss(logits[index], labels[index], 1), logits)
    (found,) = torch.autograd.grad(global_mean_loss(logits, labels, 1, torch.tensor([1.0, 3.0, 2.0])), logits)
    torch.testing.assert_close(found, repeated)
