"""Photos of renderings: what the gap changes, that seeds decide them, and what an epoch shows of queries."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mim_torchrec.csft.queries import ChangedPixels, Queries, StoredViews, seed_of
from mim_torchrec.data.photos import augmented, photographed, seeded
from mim_torchrec.data.shop import ShopConfig, make_shop
from mim_torchrec.data.uploads import Upload
from mim_torchrec.errors import OptionError

SIZE = 24


def rendering(count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Red squares on green."""
    pixels = np.zeros((count, SIZE, SIZE, 3), np.uint8)
    pixels[..., 1] = 200
    inside = np.zeros((count, SIZE, SIZE), np.float32)
    inside[:, 6:18, 6:18] = 1
    pixels[:, 6:18, 6:18] = (200, 0, 0)
    return pixels, inside


def distance(photos: np.ndarray, pixels: np.ndarray) -> float:
    return float(np.abs(photos.astype(float) - pixels).mean())


def test_photos_leave_renderings_as_the_gap_grows():
    pixels, inside = rendering(16)
    distances = [distance(photographed(pixels, inside, gap, 0), pixels) for gap in (0.1, 0.5, 1.0)]
    assert distances == sorted(distances) and distances[0] < 20 < distances[2]


def test_at_a_gap_of_one_the_ground_of_a_rendering_does_not_matter():
    pixels, inside = rendering()
    other = np.where(inside[..., None] > 0, pixels, 255 - pixels).astype(np.uint8)
    first, second = photographed(pixels, inside, 1.0, 0), photographed(other, inside, 1.0, 0)
    corners = (slice(None), [0, 0, -1, -1], [0, -1, 0, -1])
    assert np.abs(first[corners].astype(int) - second[corners]).max() <= 1
    assert distance(photographed(pixels, inside, 0.5, 0), photographed(other, inside, 0.5, 0)) > 10


def test_seeds_decide_photos_and_nothing_else_draws_by_them():
    pixels, inside = rendering()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = photographed(pixels, inside, 0.7, 1)
    assert torch.equal(torch.rand(1), expected)
    assert np.array_equal(first, photographed(pixels, inside, 0.7, 1))
    assert not np.array_equal(first, photographed(pixels, inside, 0.7, 2))
    with pytest.raises(RuntimeError), seeded(1):
        raise RuntimeError
    torch.manual_seed(5)
    torch.rand(1)
    assert torch.equal(torch.rand(1), torch.manual_seed(5) and torch.rand(2)[1:])


def test_seeds_touch_no_draw_of_a_thread_that_trains_meanwhile():
    """Images are changed by the thread that makes batches ahead, and dropout draws in the one that trains."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with ThreadPoolExecutor(1) as other, seeded(1):
        first = torch.rand(1)
        seen = [other.submit(torch.rand, 1).result() for _ in range(2)]
        second = torch.rand(1)
    assert torch.equal(torch.cat([*seen, torch.rand(1)]), expected)
    torch.manual_seed(1)
    assert torch.equal(torch.cat([first, second]), torch.cat([torch.rand(1), torch.rand(1)]))


def test_an_image_is_changed_by_its_own_seed_whatever_is_beside_it():
    images = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    whole = augmented(images, [7, 8, 9], 0.5)
    assert whole.dtype == torch.uint8 and torch.equal(augmented(images[1:2], [8], 0.5)[0], whole[1])
    assert not torch.equal(whole, images) and not torch.equal(augmented(images[:1], [8], 0.5)[0], whole[0])


class Numbers:
    """Inputs whose image k is k everywhere."""

    def send_images(self, index: np.ndarray, upload: Upload):
        pixels = torch.arange(9 * SIZE * SIZE).view(9, 1, SIZE, SIZE) % 251
        return upload.add(pixels.expand(9, 3, SIZE, SIZE).to(torch.uint8)[torch.from_numpy(index)])


def sent(queries: Queries, index: np.ndarray, epoch: int) -> torch.Tensor:
    """Images that a step sees."""
    upload = Upload(torch.device("cpu"))
    found = queries.send(index, epoch, upload)
    upload.send()
    return found()


def test_trained_towers_see_a_query_otherwise_in_every_epoch():
    changed = ChangedPixels(Numbers(), 0.6, seed=3)
    index = np.array([2, 5])
    assert torch.equal(sent(changed, index, 0), sent(changed, index, 0))
    assert torch.equal(sent(changed, index[1:], 1)[0], sent(changed, index, 1)[1])
    assert not torch.equal(sent(changed, index, 0), sent(changed, index, 1))


class Rows:
    """Inputs whose feature of image k is k."""

    def send_images(self, index: np.ndarray, upload: Upload):
        return upload.add(torch.from_numpy(index)[:, None].float())


def test_frozen_towers_show_every_view_of_a_query_and_the_query_itself():
    rows = np.array([3, 5, 8])
    views = torch.tensor([[103.0, 105, 108], [203.0, 205, 208]])[..., None]
    stored = StoredViews(Rows(), views, rows, seed=0)
    seen = torch.stack([sent(stored, np.array([8, 3]), epoch) for epoch in range(40)])[..., 0]
    assert set(seen[:, 0].tolist()) == {8.0, 108.0, 208.0} and set(seen[:, 1].tolist()) == {3.0, 103.0, 203.0}
    assert torch.equal(sent(stored, np.array([3]), 7)[0], sent(stored, np.array([8, 3]), 7)[1])


def test_seeds_of_several_numbers_differ_by_each():
    assert len({seed_of(a, b, c) for a in range(3) for b in range(3) for c in range(3)}) == 27


def shop(folder, **changes) -> dict[str, bytes]:
    sizes = {"items": 120, "users": 20, "requests": 30, "searches": 10, "browsing": 60, "categories": 3,
             "days": 5, "image_size": 16}  # fmt: skip
    make_shop(ShopConfig(out=folder, **sizes, **changes))
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.parquet")}


def test_only_the_images_of_searches_are_photos(tmp_path):
    plain, photos = shop(tmp_path / "plain"), shop(tmp_path / "photos", photo_gap=0.8)
    assert [name for name in plain if plain[name] != photos[name]] == [
        name for name in plain if name.startswith("pairs/")
    ]
    tables = [pq.read_table(tmp_path / name / "pairs") for name in ("plain", "photos")]
    image = next(name for name in tables[0].column_names if "image" in name)
    assert tables[0].drop([image]).equals(tables[1].drop([image]))
    assert not any(a == b for a, b in zip(*(t[image].to_pylist() for t in tables), strict=True))
    assert '"photo_gap": 0.8' in (tmp_path / "photos" / "dataset.json").read_text()


def test_a_gap_beyond_one_is_refused(tmp_path):
    with pytest.raises(OptionError, match="photo-gap"):
        shop(tmp_path / "out", photo_gap=1.5)
