"""What a frozen collection takes and refuses in one process, and which table a name means."""

import logging

import pytest
import torch
from torch import nn
from torchrec.distributed.fp_embeddingbag import FeatureProcessedEmbeddingBagCollectionSharder
from torchrec.distributed.types import BoundsCheckMode, ParameterSharding, ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.feature_processor_ import PositionWeightedModule
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.bounds import BoundsCheck, Limits
from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingBagCollection, FrozenEmbeddingCollection
from mim_torchrec.embeddings.sharded.live import table_state
from mim_torchrec.embeddings.sharded.load import find_frozen, table_digest
from mim_torchrec.embeddings.sharded.sharder import (
    FrozenEmbeddingBagCollectionSharder,
    FrozenEmbeddingCollectionSharder,
)
from mim_torchrec.embeddings.table.format import TableError
from tests.said import said

ROWS, DIM = 5, 4
ONE = ShardingEnv(world_size=1, rank=0, pg=None)


def config(kind=EmbeddingConfig, name="mm", features=("item", "history")):
    return kind(name=name, num_embeddings=ROWS, embedding_dim=DIM, feature_names=list(features))


def vectors():
    return torch.arange(ROWS * DIM).view(ROWS, DIM).float()


def fill(module):
    for table in module.frozen_tables().values():
        table.store.write(torch.arange(ROWS), vectors())
    return module


def unpooled(**options):
    return fill(FrozenEmbeddingCollection([config()], device="cpu", **options))


def pooled(**options):
    return fill(FrozenEmbeddingBagCollection([config(EmbeddingBagConfig)], device="cpu", **options))


def sharded(module, **plan):
    pools = isinstance(module, FrozenEmbeddingBagCollection)
    sharder = (FrozenEmbeddingBagCollectionSharder if pools else FrozenEmbeddingCollectionSharder)()
    plans = {"mm": ParameterSharding(sharding_type="row_wise", compute_kernel="fused", **plan)}
    return sharder.shard(module, plans, ONE, torch.device("cpu"))


def features(keys=("item", "history"), values=(1, 2, 3), lengths=(1, 0, 1, 1), **options):
    return KeyedJaggedTensor(list(keys), torch.tensor(values), lengths=torch.tensor(lengths), **options)


def variable_batch(inverse=True):
    """One history for both candidates: TorchRec's way to look up a user's history once."""
    index = torch.tensor([[0, 1], [0, 0]])
    return KeyedJaggedTensor(
        ["item", "history"], torch.tensor([1, 2, 3, 4]), lengths=torch.tensor([1, 1, 2]),
        stride_per_key_per_rank=[[2], [1]], inverse_indices=(["item", "history"], index) if inverse else None,
    )  # fmt: skip


@pytest.mark.parametrize("make", [pooled, lambda: sharded(pooled())], ids=["unsharded", "sharded"])
def test_bags_that_several_examples_share_are_pooled_for_each(make):
    found = make()(variable_batch())
    history = vectors()[3] + vectors()[4]
    assert torch.equal(found["item"], vectors()[1:3])
    assert torch.equal(found["history"], torch.stack([history, history]))


def test_vectors_of_bags_that_several_examples_share_are_repeated_where_a_collection_is_sharded():
    found = sharded(unpooled(need_indices=True))(variable_batch()).wait()["history"]
    assert found.lengths().tolist() == [2, 2] and found.weights().tolist() == [3, 4, 3, 4]
    assert torch.equal(found.values(), vectors()[[3, 4, 3, 4]])


@pytest.mark.parametrize("make", [pooled, lambda: sharded(pooled()), lambda: sharded(unpooled())])
def test_bags_that_nobody_assigns_to_examples_are_refused(make):
    with pytest.raises(ValueError, match="inverse indices"):
        make()(variable_batch(inverse=False))


def test_a_bag_that_does_not_exist_is_an_error_and_stays_the_same_error():
    batch = variable_batch()
    batch.inverse_indices()[1][1] = 7
    found = sharded(unpooled())(batch)
    errors = []
    for _ in range(2):
        with pytest.raises(Exception, match="index out of range") as error:
            found.wait()
        errors.append(error.value)
    assert errors[0] is errors[1]


@pytest.mark.parametrize("module", [unpooled, pooled, lambda: sharded(unpooled()), lambda: sharded(pooled())])
@pytest.mark.parametrize("batch, error", [
    (features(("item", "item", "history"), lengths=(1, 1, 1)), r"must be unique: features \['item'\]"),
    (features(("item", "other")), r"features \['history'\] of the frozen collection are not in the batch"),
    (features(values=(1.0, 2.0, 3.0)), "rows, integers, not torch.float32"),
])  # fmt: skip
def test_features_that_cannot_be_looked_up_are_refused_by_name(module, batch, error):
    with pytest.raises((ValueError, TypeError), match=error):
        module()(batch)


@pytest.mark.parametrize("wrap", [lambda module: module, sharded], ids=["unsharded", "sharded"])
def test_a_weighted_collection_needs_weights(wrap):
    with pytest.raises(ValueError, match="is_weighted=True and the batch has no weights"):
        wrap(pooled(is_weighted=True))(features())


@pytest.mark.parametrize("wrap", [lambda module: module, sharded], ids=["unsharded", "sharded"])
@pytest.mark.parametrize("kind, of", [(FrozenEmbeddingCollection, EmbeddingConfig),
                                      (FrozenEmbeddingBagCollection, EmbeddingBagConfig)])  # fmt: skip
def test_a_lookup_before_rows_are_loaded_is_refused(wrap, kind, of):
    module = wrap(kind([config(of)], device="cpu"))
    with pytest.raises(TableError, match="frozen table mm has no rows yet: load_table"):
        module(features())


def test_rows_of_a_checkpoint_can_be_looked_up():
    state = unpooled(store_rows=True).state_dict()
    module = FrozenEmbeddingCollection([config()], device="cpu", store_rows=True)
    module.load_state_dict(state)
    assert torch.equal(module(features())["item"].values(), vectors()[1:2])


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.item = unpooled(), unpooled()


@pytest.mark.parametrize("find", [find_frozen, table_digest, table_state])
def test_a_name_that_two_collections_have_is_refused_and_the_collection_resolves_it(find):
    model = Towers()
    with pytest.raises(TableError, match="2 frozen tables 'mm', in user and item"):
        find(model, "mm")
    find(model.user, "mm")


@pytest.mark.parametrize("mode", ["FATAL", "V2_FATAL"])
@pytest.mark.parametrize("row", [-1, ROWS])
def test_a_row_that_does_not_exist_is_named(mode, row):
    plan = {"bounds_check_mode": BoundsCheckMode[mode]}
    for module in (unpooled(bounds_check=BoundsCheckMode[mode]), sharded(pooled(), **plan)):
        with pytest.raises(IndexError, match=f"mm: row {row} is not within 0:{ROWS}"):
            module(features(values=(1, row, 2)))


@pytest.mark.parametrize("mode, messages", [("WARNING", 1), ("IGNORE", 0)])
@pytest.mark.parametrize("make", [
    lambda mode: unpooled(bounds_check=mode), lambda mode: sharded(unpooled(), bounds_check_mode=mode),
])  # fmt: skip
def test_row_0_is_looked_up_instead_where_a_bounds_check_says_so(caplog, make, mode, messages):
    module = make(BoundsCheckMode[mode])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = dict(module(features(values=(1, ROWS, -3))))
    assert torch.equal(found["history"].values(), vectors()[[0, 0]])
    found = said(caplog, "embeddings.sharded.bounds")
    assert len(found) == messages
    assert all("mm: row -3 is not within 0:5; row 0 is looked up" in text for text in found)


def test_a_sharder_has_a_bounds_check_for_tables_whose_plan_has_none():
    plan = {"mm": ParameterSharding(sharding_type="row_wise", compute_kernel="fused")}
    sharder = FrozenEmbeddingCollectionSharder({"bounds_check_mode": BoundsCheckMode.IGNORE})
    module = sharder.shard(unpooled(), plan, ONE, torch.device("cpu"))
    found = dict(module(features(values=(1, ROWS, 2))))
    assert torch.equal(found["history"].values(), vectors()[[0, 2]])


def test_a_table_without_a_bounds_check_is_refused():
    with pytest.raises(ValueError, match="mm: bounds check NONE is none of FATAL, WARNING and IGNORE"):
        unpooled(bounds_check=BoundsCheckMode.NONE)


def test_rows_on_a_gpu_are_replaced_in_the_lookup_and_named_when_it_is_waited_for():
    check = BoundsCheck(config())  # without the GPU: what runs there, on this device
    rows = torch.tensor([-2, 1, ROWS + 1])
    assert check.existing(rows).tolist() == [0, 1, ROWS - 1]  # in order still
    with pytest.raises(IndexError, match="mm: row -2 is not within 0:5"):
        Limits(check, *rows.aminmax()).settle()
    Limits(check, *torch.tensor([0, ROWS - 1]).aminmax()).settle()


def test_a_sharder_of_feature_processors_is_refused_because_it_weights_rows_and_not_bags():
    module = FeatureProcessedEmbeddingBagCollection(
        pooled(is_weighted=True), {name: PositionWeightedModule(3) for name in ("item", "history")}
    )
    plan = {"mm": ParameterSharding(sharding_type="row_wise", compute_kernel="fused")}
    sharder = FeatureProcessedEmbeddingBagCollectionSharder(FrozenEmbeddingBagCollectionSharder())
    sharded = sharder.shard(module, plan, ONE, torch.device("cpu"))
    with pytest.raises(ValueError, match="no such sharder, and the frozen collection inside is sharded"):
        sharded(features())


def test_a_feature_processor_weights_frozen_bags_and_its_weights_get_gradients():
    processors = {name: PositionWeightedModule(max_feature_length=3) for name in ("item", "history")}
    for shard in (lambda module: module, sharded):
        module = FeatureProcessedEmbeddingBagCollection(pooled(is_weighted=True), processors)
        module._embedding_bag_collection = shard(module._embedding_bag_collection)
        with torch.no_grad():
            processors["history"].position_weight.copy_(torch.tensor([0.5, 2.0, 3.0]))
        found = module(features(values=(1, 2, 3), lengths=(1, 0, 0, 2)))
        assert torch.equal(
            found["history"], torch.stack([torch.zeros(DIM), vectors()[2] / 2 + 2 * vectors()[3]])
        )
        found["history"].sum().backward()
        gradient = processors["history"].position_weight.grad
        assert torch.equal(gradient, torch.tensor([vectors()[2].sum(), vectors()[3].sum(), 0]))
        processors["history"].position_weight.grad = None
