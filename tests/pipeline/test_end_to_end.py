"""Table 6's baselines on the data of a shop, and the stage whose process has no encoder."""

import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from mim_torchrec.benchmarks.measures.encoders import word_tokenizer
from mim_torchrec.benchmarks.measures.training_steps import training_step
from mim_torchrec.benchmarks.paper.efficiency.encoders_in_step import (
    FEATURES,
    Encoded,
    RandomContent,
    build_encoded_model,
)
from mim_torchrec.ciubm.ubm.sim import SIMOptions
from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.sharding import build_model, shard
from mim_torchrec.data.id_scan import scan_ids
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.schema import Dataset
from mim_torchrec.data.vocabulary import IdMapper, Vocabulary
from mim_torchrec.embeddings.sharded.frozen import frozen_config
from mim_torchrec.embeddings.sharded.item_index import ItemIndex
from mim_torchrec.embeddings.sharded.load import load_table, open_table
from mim_torchrec.embeddings.table.format import TableWriter
from mim_torchrec.encoders.item_encoder import HeadConfig, ItemEncoder, ItemEncoderConfig
from mim_torchrec.encoders.text import TextEncoderConfig
from mim_torchrec.encoders.vision import VisionEncoderConfig
from mim_torchrec.training.distributed import distributed
from tests.programs import small_shop

pytestmark = pytest.mark.slow


DIM = 16
STAGE = """
import sys
from mim_torchrec.ctr.main import main
main(sys.argv[1:])
loaded = {name.split(".")[0] for name in sys.modules} & {"timm", "transformers", "tokenizers"}
loaded |= {name for name in sys.modules if name.startswith("mim_torchrec.encoders")}
assert not loaded, loaded
"""


def new_encoder() -> ItemEncoder:
    torch.manual_seed(0)
    vision = VisionEncoderConfig(name="test_vit", weights="random", image_size=32)
    text = TextEncoderConfig(name="bert-tiny", weights="random", max_length=12)
    head = HeadConfig(dim=DIM, fusion_dim=8, dropout=0.0)
    return ItemEncoder.build(ItemEncoderConfig(vision=vision, text=text, head=head), word_tokenizer())


class Shop:
    """A shop, the vectors of an encoder that nobody has trained, and readers of its requests."""

    def __init__(self, root: Path) -> None:
        self.folder, self.table = small_shop(root), root / "table"
        self.dataset = Dataset(self.folder)
        self.items = ItemStore.open(self.dataset, root / "cache")
        self.ids = torch.from_numpy(self.items.item_ids)
        encoder = new_encoder().eval()
        writer = TableWriter(self.table, table_version="untrained", dim=DIM, dtype="float32", encoder={})
        catalog = RandomContent.read(self.items, encoder)
        with torch.no_grad():
            vectors = encoder.encode_table(*catalog.of(torch.arange(1, 1 + len(self.ids))))
        writer.write_shard(self.ids, vectors)
        writer.finish(None)
        vocabularies = {k: Vocabulary.build(v) for k, v in scan_ids(self.dataset.requests("train")).items()}
        self.rows = {name: vocabulary.num_embeddings for name, vocabulary in vocabularies.items()}
        mapper = IdMapper(vocabularies, ItemIndex(self.ids, len(self.ids)), 1.0)
        reader = RequestReader(self.dataset.requests("train"), batch_size=16)
        self.batches = [mapper(batch) for batch in islice(reader, 3)]
        self.settings = CTRConfig(
            data=self.folder,
            out=root,
            ubm="sim",
            ubm_options=SIMOptions(heads=1, top_k=3),
            embedding_dim=4,
            tower=(8,),
            lr=1e-3,
        )


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Shop:
    return Shop(tmp_path_factory.mktemp("end_to_end"))


def encoded(shop: Shop, trained: bool):
    encoder = new_encoder()
    source = Encoded(encoder, RandomContent.read(shop.items, encoder), trained)
    return encoder, build_encoded_model(shop.settings, shop.rows, source, DIM)


def test_the_click_loss_trains_the_foundation_models_end_to_end(shop):
    with distributed(0) as ranks:
        encoder, model = encoded(shop, trained=True)
        before = {name: value.detach().clone() for name, value in encoder.named_parameters()}
        model, optimizer = shard(model, shop.settings, ranks)
        step = training_step(model, optimizer, shop.settings, ranks)
        for batch in shop.batches:
            step(batch)
    for tower in ("vision", "text", "head"):
        trained = {k: v for k, v in encoder.named_parameters() if k.startswith(tower) and v.requires_grad}
        assert all(value.grad is not None for value in trained.values())
        moved = [name for name, value in trained.items() if not torch.equal(value, before[name])]
        assert any(float(value.grad.abs().sum()) > 0 for value in trained.values())
        assert len(moved) > 0.8 * len(trained), sorted(set(trained) - set(moved))


def test_without_a_representation_center_the_foundation_models_stay_as_they_are(shop):
    with distributed(0) as ranks:
        encoder, model = encoded(shop, trained=False)
        before = {name: value.clone() for name, value in encoder.state_dict().items()}
        model, optimizer = shard(model, shop.settings, ranks)
        step = training_step(model, optimizer, shop.settings, ranks)
        for batch in shop.batches:
            step(batch)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(value.grad is None for value in encoder.parameters())


def test_vectors_encoded_in_the_step_score_as_those_of_the_table_do(shop):
    table = open_table(shop.table)
    frozen = build_model(shop.settings, shop.rows, frozen_config(table, FEATURES), torch.device("meta"))
    with distributed(0) as ranks:
        logits = []
        for model in (frozen, encoded(shop, trained=False)[1]):
            sharded, _ = shard(model, shop.settings, ranks)
            if model is frozen:
                load_table(sharded.module.mm_embeddings, table)
            with torch.no_grad():
                logits.append(sharded.eval()(shop.batches[0]).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)


def test_mim_trains_on_the_same_data_in_a_process_without_encoders(shop, tmp_path):
    flags = ["--data", shop.folder, "--table", shop.table, "--out", tmp_path / "run", "--epochs", "1",
             "--batch-size", "64", "--ubm", "sim", "--heads", "1", "--embedding-dim", "4",
             "--tower", "8"]  # fmt: skip
    command = [sys.executable, "-c", STAGE, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "metrics.json").is_file()
