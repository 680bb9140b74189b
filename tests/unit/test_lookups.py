"""Bytes of lookups against sums by hand."""

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.benchmarks.measures.lookups import embedding_bytes, table_bytes

TABLE = EmbeddingConfig(name="item", num_embeddings=9, embedding_dim=4, feature_names=["a", "b"])
BATCH = KeyedJaggedTensor(
    ["a", "b", "c"], torch.tensor([1, 2, 1, 3, 7]), lengths=torch.tensor([2, 0, 1, 1, 1, 0])
)


def test_scoring_reads_the_row_of_every_id():
    assert table_bytes([TABLE], BATCH, row_bytes=4, trained=False) == 4 * (4 * 4)
    assert table_bytes([TABLE], BATCH, row_bytes=2, trained=False) == 4 * (4 * 2)


def test_training_adds_gradients_and_reads_and_writes_distinct_rows_with_their_state():
    gradients, updated = 4 * 4 * 4, 2 * 3 * (4 + 1) * 4
    assert table_bytes([TABLE], BATCH, row_bytes=4, trained=True) == 4 * (4 * 4) + gradients + updated


def test_an_embedding_of_torch_reads_rows_and_writes_a_dense_gradient():
    layer, ids = nn.Embedding(10, 3), torch.tensor([[1, 2], [1, 9]])
    rows = 4 * 3 * 4
    assert embedding_bytes(lambda: layer(ids)) == rows
    assert embedding_bytes(lambda: layer(ids).sum().backward()) == rows + rows + 10 * 3 * 4
