"""A small shop with pictures, an encoder, its table and a model: what the page of the server shows."""

from pathlib import Path

import numpy as np
import torch

from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import Dataset
from mim_torchrec.embeddings.table.format import TableWriter
from mim_torchrec.encoders.checkpoint import save_encoder
from mim_torchrec.encoders.item_encoder import HeadConfig, ItemEncoder, ItemEncoderConfig
from mim_torchrec.encoders.text import TextEncoderConfig, train_tokenizer
from mim_torchrec.encoders.vision import VisionEncoderConfig
from mim_torchrec.representation.export import TrainedEncoder
from tests.programs import small_shop
from tests.serving import trained_bundle


def shop_with_encoder(root: Path) -> Path:
    """Write `data`, `encoder`, `table` of its vectors and `run` with its `bundle` into a folder."""
    small_shop(root, searches=20, requests=200).rename(root / "data")
    items = ItemStore.open(Dataset(root / "data"), root / "cache")
    rows = np.arange(len(items))
    torch.manual_seed(0)
    config = ItemEncoderConfig(
        vision=VisionEncoderConfig(name="test_resnet.r160_in1k", weights="random", image_size=32),
        text=TextEncoderConfig(name="bert-tiny", weights="random", max_length=8),
        head=HeadConfig(dim=8, fusion_dim=4, hidden_dim=8),
    )
    built = ItemEncoder.build(config, train_tokenizer(items.titles(rows), 64))
    version = save_encoder(built, root / "encoder")
    encoder = TrainedEncoder(str(root / "encoder"), torch.device("cpu"))
    with torch.inference_mode():
        vectors = encoder(items.images(rows), items.titles(rows)).float()
    writer = TableWriter(root / "table", table_version=version, dim=8, dtype="float32", encoder={})
    writer.write_shard(torch.from_numpy(items.item_ids.copy()), vectors.clone())
    writer.finish(None)
    trained_bundle(root, "run")
    return root
