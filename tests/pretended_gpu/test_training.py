"""What is different where there is a GPU: when losses are read, rows examined, and tensors moved."""

import numpy as np
import pytest
import torch
from torchrec.distributed.types import BoundsCheckMode
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.benchmarks.rehearsal.counts import Counts
from mim_torchrec.benchmarks.rehearsal.pretended import pretended_gpu
from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.csft.inputs import FeatureInputs
from mim_torchrec.csft.queries import StoredViews
from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.data.packed_batch import packed
from mim_torchrec.data.uploads import Upload
from mim_torchrec.embeddings.sharded.bounds import BoundsCheck, Limits
from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingCollection, frozen_config
from mim_torchrec.embeddings.sharded.item_index import ItemIndex
from mim_torchrec.embeddings.sharded.live import delete_items, update_items
from mim_torchrec.embeddings.sharded.load import load_table
from mim_torchrec.embeddings.sharded.step import FrozenContext
from mim_torchrec.embeddings.table.format import NonFiniteVector, Table, TableWriter
from mim_torchrec.losses.queue import ItemQueue
from mim_torchrec.training.distributed import DistributedContext
from mim_torchrec.training.generators import get_generators, set_generators
from tests.histories import offsets
from tests.unit.test_loop import Line, run

GPU = torch.device("cuda", 0)


@pytest.fixture
def counts():
    counts = Counts()
    with pretended_gpu(counts):
        yield counts


class LineOnGPU(Line):
    """The task of one weight, on the GPU."""

    def __init__(self, batch_values: tuple[float, ...]) -> None:
        super().__init__([], batch_values)
        self.model.to(GPU)

    def batches(self, epoch, first=0):
        for batch in super().batches(epoch, first):
            yield batch.to(GPU)


def test_a_step_waits_once_and_has_the_losses_of_the_cpu(tmp_path, counts):
    values = (1.0, 2.0, 0.5, 1.5)
    expected = run(Line([], values), tmp_path / "cpu", epochs=1)
    before = counts.syncs.total()
    found = run(LineOnGPU(values), tmp_path / "gpu", epochs=1, context=DistributedContext(0, 1, GPU),
                log_every=100)  # fmt: skip
    assert found.epochs[0]["loss"] == pytest.approx(expected.epochs[0]["loss"])
    per_step = [line for line in counts.syncs if line.startswith("event")]
    assert sum(counts.syncs[line] for line in per_step) - before == len(values)


def test_a_loss_that_is_not_finite_takes_no_step(tmp_path, counts):
    task = LineOnGPU((1.0, float("nan")))
    with pytest.raises(FloatingPointError, match="epoch 0 at step 2"):
        run(task, tmp_path, context=DistributedContext(0, 1, GPU))
    assert torch.isfinite(task.model.weight).all()


@pytest.fixture
def live(tmp_path, counts):
    """A table on the GPU, and its index."""
    writer = TableWriter(tmp_path / "t", table_version="v", dim=4, dtype="float16", encoder={}, spare_rows=2)
    writer.write_shard(torch.tensor([30, 10, 20]), torch.ones(3, 4))
    writer.finish()
    table = Table.open(tmp_path / "t")
    module = FrozenEmbeddingCollection([frozen_config(table, ["item"])], device=GPU)
    load_table(module, table)
    return module, ItemIndex.of(table)


def test_items_on_the_gpu_are_written_and_deleted(live):
    module, index = live
    ids = torch.tensor([7, 10], device=GPU)
    report = update_items(module, index, ids, torch.full((2, 4), 2.0, device=GPU), table_version="v", seq=1)
    assert (report.items, report.rows) == (2, 2)
    delete_items(module, index, ids[1:], table_version="v", seq=2)
    rows = index.rows(torch.tensor([7, 10, 20]))
    features = KeyedJaggedTensor(["item"], rows.to(GPU), lengths=torch.tensor([3], device=GPU))
    assert module(features)["item"].values().sum(1).tolist() == [8.0, 0.0, 4.0]


def test_an_item_on_the_gpu_without_a_finite_vector_is_named(live):
    module, index = live
    vectors = torch.tensor([[1.0] * 4, [float("nan")] * 4], device=GPU)
    with pytest.raises(NonFiniteVector, match="item id 9"):
        update_items(module, index, torch.tensor([8, 9], device=GPU), vectors, table_version="v", seq=1)


@pytest.mark.parametrize("then", [lambda module: module.eval(), lambda module: module.state_dict()])
def test_a_row_that_training_has_not_waited_for_is_an_error_afterwards(live, then):
    module, _ = live
    config = module.embedding_configs()[0]
    rows = torch.tensor([0, config.num_embeddings], device=GPU) + 0
    module.train()
    module.settle([Limits(BoundsCheck(config, BoundsCheckMode.FATAL), rows[0], rows[1])])
    with pytest.raises(IndexError, match=f"row {config.num_embeddings} is not within"):
        then(module)


def test_features_of_frozen_towers_lie_on_the_gpu_where_they_fit(counts, monkeypatch):
    image, text, rows = torch.randn(5, 3), torch.randn(4, 2), np.array([3, 0, 3])
    small, fits = (0, 0), []
    for free in (torch.cuda.mem_get_info(), small):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: free)
        inputs = FeatureInputs(image, text, GPU)
        fits.append(all(held.is_cuda for held in inputs._held))
        assert inputs.images(rows).is_cuda and inputs.images(rows).tolist() == image[rows].tolist()
        assert inputs.texts(rows).is_cuda and inputs.texts(rows).tolist() == text[rows].tolist()
    assert fits == [True, False]


@pytest.mark.parametrize("free", [64 << 30, 0])
def test_features_of_a_batch_go_to_the_gpu_in_one_copy(counts, monkeypatch, free):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    views, own = torch.randn(2, 3, 3), np.array([0, 2, 3])
    inputs, rows, upload = FeatureInputs(torch.randn(5, 3), torch.randn(4, 2), GPU), own[[2, 0]], Upload(GPU)
    before = counts.uploads.total(), counts.pageable.total()
    query = StoredViews(inputs, views, own, seed=0).send(rows, 1, upload)
    image, text = inputs.send_images(rows, upload), inputs.send_texts(rows, upload)
    upload.send()
    assert image().tolist() == inputs.image[rows].tolist() and text().tolist() == inputs.text[rows].tolist()
    assert query().is_cuda and counts.uploads.total() - before[0] == 1
    assert counts.pageable.total() == before[1]


def test_a_queue_that_was_loaded_goes_to_the_gpu_with_its_first_batch(counts):
    one, other = ItemQueue(["mm"], 2), ItemQueue(["mm"], 2)
    one.push([torch.ones(3, 4)], torch.arange(3))
    other.set_extra_state(one.get_extra_state())
    other.push([torch.zeros(3, 4, device=GPU)], torch.arange(3, device=GPU))
    assert other.vectors("mm").is_cuda and other.ids.is_cuda and counts.syncs.total() == 0
    assert other.vectors("mm").sum() == 12 and other.ids.tolist() == [0, 1, 2, 0, 1, 2]


def test_checkpoints_hold_the_generator_of_the_gpu(counts, monkeypatch):
    restored = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    states = get_generators()
    set_generators(states)
    assert len(restored) == 1 and restored[0] is states["cuda"]


def test_a_stream_keeps_the_offsets_of_every_feature(monkeypatch):
    features = KeyedJaggedTensor(["a", "b"], torch.arange(4), lengths=torch.tensor([1, 1, 2, 0]))
    own = [feature.offsets() for feature in features.to_dict().values()]
    kept: list[int] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, _: kept.append(tensor.data_ptr()))
    FrozenContext(features=features).record_stream(torch.Stream("cpu"))
    assert {each.data_ptr() for each in own} <= set(kept)


def test_a_packed_batch_goes_to_the_gpu_in_one_copy_with_its_pairs(counts):
    lengths = torch.tensor([2, 1, 0, 3, 0, 1])  # candidates and behaviors of three requests
    sparse = KeyedJaggedTensor(["candidate_item_id", "behavior_item_id"], torch.arange(7), lengths=lengths)
    batch = RequestBatch(sparse, torch.tensor([0.0, 1.0, 1.0]), torch.arange(3), weights=torch.rand(3))
    there = packed(batch).to(GPU, non_blocking=True)
    assert (counts.uploads.total(), counts.pageable.total(), counts.syncs.total()) == (1, 0, 0)
    assert there.layout is not None and there.labels.is_cuda and there.request_ts is None
    pairs = RequestPairs.laid_out(there.layout)
    assert counts.syncs.total() == 0
    expected = RequestPairs.build(offsets([2, 1, 0]), offsets([3, 0, 1]))
    for name in ("candidate_index", "behavior_index", "pair_offsets", "behavior_request", "order"):
        assert getattr(pairs, name).tolist() == getattr(expected, name).tolist()
    assert pairs.by_behavior.position.tolist() == expected.by_behavior.position.tolist()
    assert there.sparse["behavior_item_id"].values().tolist() == [3, 4, 5, 6]
    assert there.weights.tolist() == batch.weights.tolist()
