"""MovieLens in the schema of a shop, on a few made-up films and ratings."""

import datetime as dt
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.movielens import main
from mim_torchrec.data.schema import SPLITS, Dataset
from mim_torchrec.errors import OutputExists

NUM_USERS, NUM_FILMS = 12, 40
WITHOUT_POSTER, WITHOUT_TITLE, NEVER_RATED = 3, 5, 8


def poster(color: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 9), (color, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def ratings() -> list[tuple[int, int, float, int]]:
    """Every user rates 20 films, two in each second."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(1, NUM_USERS + 1):
        films = rng.permutation([f for f in range(1, NUM_FILMS + 1) if f != NEVER_RATED])[:20]
        for k, film in enumerate(films):
            ts = 1_000_000 + 100 * user + k // 2
            rows.append((user, int(film), float(rng.choice([2.5, 4.0, 5.0])), ts))
    return rows


def write_source(
    folder: Path, rows: list | None = None, films: dict | None = None, posters: list | None = None
) -> list[str]:
    """Write the three files; returns the arguments that name them."""
    rows = ratings() if rows is None else rows
    lines = ["userId,movieId,rating,timestamp", *(",".join(map(str, row)) for row in rows)]
    (folder / "ratings.csv").write_text("\n".join(lines) + "\n")
    if films is None:
        films = {f: f"Comedy|Genre {f}" if f % 2 else "Drama" for f in range(1, NUM_FILMS + 1)
                 if f != WITHOUT_TITLE}  # fmt: skip
    described = (f'{film},"Film, the {film}th (1999)",{genres}' for film, genres in films.items())
    lines = ["movieId,title,genres", *described]
    (folder / "movies.csv").write_text("\n".join(lines) + "\n")
    if posters is None:
        posters = [(f, poster(f)) for f in range(NUM_FILMS, 0, -1) if f != WITHOUT_POSTER]
    table = pa.table({"movieId": [p[0] for p in posters],
                      "image": pa.array([p[1] for p in posters], pa.binary())})  # fmt: skip
    pq.write_table(table, folder / "posters.parquet", row_group_size=10)
    return ["--ratings", str(folder), "--posters", str(folder / "posters.parquet")]


def imported(folder: Path, *options: str, **source) -> Dataset:
    arguments = write_source(folder, **source)
    main([*arguments, "--out", str(folder / "out"), *options])
    return Dataset(folder / "out")


def requests_of(dataset: Dataset) -> dict[str, list[dict]]:
    return {split: pq.read_table(dataset.requests(split)).to_pylist() for split in SPLITS}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return imported(tmp_path_factory.mktemp("movielens"))


@pytest.fixture(scope="module")
def requests(dataset) -> dict[str, list[dict]]:
    return requests_of(dataset)


def likes_of(user: int) -> list[tuple[int, int]]:
    """Naive: (ts, film) of a user's positives among the films that take part, in order of time."""
    out = [WITHOUT_POSTER, WITHOUT_TITLE]
    return sorted((t, f) for u, f, r, t in ratings() if u == user and r >= 4 and f not in out)


def positive(request: dict) -> int:
    return request["candidate_item_ids"][request["labels"].index(1)]


def test_items_are_the_rated_films_with_title_and_poster(dataset):
    rated = {film for _, film, _, _ in ratings()}
    table = pq.read_table(dataset.items()).to_pylist()
    assert {row["item_id"] for row in table} == rated - {WITHOUT_POSTER, WITHOUT_TITLE, NEVER_RATED}
    for row in table:
        film = row["item_id"]
        assert row["title"] == f"Film, the {film}th (1999)"
        assert row["image"] == poster(film)
        assert row["category"] == ("Comedy" if film % 2 else "Drama")
        first = min(t for _, f, _, t in ratings() if f == film)
        assert row["listed_at"] == dt.datetime.fromtimestamp(first, dt.UTC).replace(tzinfo=None)


def test_every_positive_is_one_request_of_its_part_by_time(requests):
    for user in range(1, NUM_USERS + 1):
        likes = likes_of(user)
        bounds = [0, len(likes) * 8 // 10, len(likes) * 9 // 10, len(likes)]
        for split, start, stop in zip(SPLITS, bounds, bounds[1:], strict=False):
            mine = [positive(r) for r in requests[split] if r["user_id"] == user]
            assert mine == [film for _, film in likes[start:stop]]


def test_a_history_is_what_was_liked_strictly_before(requests):
    for request in (r for part in requests.values() for r in part):
        likes = likes_of(request["user_id"])
        now = next(t for t, f in likes if f == positive(request))
        assert request["behavior_item_ids"] == [f for t, f in likes if t < now]
        assert len(request["behavior_ts"]) == len(request["behavior_categories"])
        assert all(ts < request["ts"] for ts in request["behavior_ts"])


def test_histories_keep_the_last_behaviors(tmp_path, requests):
    short = requests_of(imported(tmp_path, "--max-behaviors", "3"))
    for split in SPLITS:
        expected = [request["behavior_item_ids"][-3:] for request in requests[split]]
        assert [request["behavior_item_ids"] for request in short[split]] == expected


def test_negatives_are_films_that_the_user_never_rated_and_others_liked_in_training(requests):
    liked = {positive(request) for request in requests["train"]}
    for request in (r for part in requests.values() for r in part):
        rated = {film for user, film, _, _ in ratings() if user == request["user_id"]}
        negatives = set(request["candidate_item_ids"]) - {positive(request)}
        assert sum(request["labels"]) == 1
        assert len(negatives) == 4
        assert not negatives & rated
        assert negatives <= liked


def test_the_positive_stands_at_every_place(requests):
    places = {request["labels"].index(1) for part in requests.values() for request in part}
    assert places == {0, 1, 2, 3, 4}


def test_pairs_are_consecutive_positives_of_the_training_part(dataset):
    expected = set()
    for user in range(1, NUM_USERS + 1):
        likes = likes_of(user)
        films = [film for _, film in likes[: len(likes) * 8 // 10]]
        expected |= set(zip(films, films[1:], strict=False))
    pairs = pq.read_table(dataset.pairs()).to_pylist()
    assert {(pair["query_id"], pair["item_id"]) for pair in pairs} == expected
    assert all(pair["query_image"] is None and pair["signal"] == "purchase" for pair in pairs)
    assert [pair["ts"] for pair in pairs] == sorted(pair["ts"] for pair in pairs)


def test_a_global_split_divides_all_by_the_same_moments(tmp_path):
    dataset = imported(tmp_path, "--split", "global")
    requests = requests_of(dataset)
    times = {split: [request["ts"] for request in requests[split]] for split in SPLITS}
    assert max(times["train"]) < min(times["validation"])
    assert max(times["validation"]) < min(times["test"])
    pairs = pq.read_table(dataset.pairs()).to_pylist()
    assert max(pair["ts"] for pair in pairs) <= max(times["train"])


def test_equal_seeds_give_equal_files_and_another_seed_others(tmp_path, requests):
    for name in ("again", "other"):
        (tmp_path / name).mkdir()
    assert requests_of(imported(tmp_path / "again")) == requests
    assert requests_of(imported(tmp_path / "other", "--seed", "1")) != requests


def test_the_description_counts_what_there_is(dataset, requests):
    described = json.loads((dataset.root / "dataset.json").read_text())
    assert described["counts"]["requests/train"] == len(requests["train"])
    assert described["films_without_title_or_poster"] == 2


def refused(folder: Path, match: str, *options: str, error: type[Exception] = DataError, **source) -> None:
    with pytest.raises(error, match=match):
        imported(folder, *options, **source)
    assert not list(folder.glob("out*"))


def test_a_damaged_poster_is_refused_with_its_place(tmp_path):
    posters = [(film, poster(film)) for film in range(1, NUM_FILMS + 1)]
    posters[13] = (14, posters[13][1][:40])
    refused(tmp_path, r"posters\.parquet, row group 1, row 3, column image", posters=posters)


def test_a_film_with_two_posters_is_refused_with_its_place(tmp_path):
    posters = [(film, poster(film)) for film in [*range(1, NUM_FILMS + 1), 7]]
    refused(tmp_path, r"posters\.parquet, row group 4, row 0, column movieId: film 7", posters=posters)


def test_a_rating_that_is_no_number_is_refused_with_its_row(tmp_path):
    rows = [*ratings()[:4], (1, 2, "good", 3)]
    refused(tmp_path, r"ratings\.csv.*Row #6.*good", rows=rows)


def test_a_missing_value_is_refused_with_its_row(tmp_path):
    rows = [*ratings()[:4], (1, 2, "", 3)]
    refused(tmp_path, r"ratings\.csv, row 4, column rating: is empty", rows=rows)


def test_a_missing_column_is_refused(tmp_path):
    arguments = write_source(tmp_path)
    text = (tmp_path / "ratings.csv").read_text().replace("timestamp", "time", 1)
    (tmp_path / "ratings.csv").write_text(text)
    with pytest.raises(DataError, match=r"ratings\.csv.*timestamp"):
        main([*arguments, "--out", str(tmp_path / "out")])


def test_an_empty_file_is_refused(tmp_path):
    refused(tmp_path, r"ratings\.csv: the file has no rows", rows=[])


def test_a_folder_without_ratings_is_refused(tmp_path):
    arguments = write_source(tmp_path)
    (tmp_path / "ratings.csv").unlink()
    with pytest.raises(DataError, match=r"ratings\.csv: no such file"):
        main([*arguments, "--out", str(tmp_path / "out")])


def test_too_few_positives_for_a_part_are_refused(tmp_path):
    refused(tmp_path, "none for validation", rows=[(1, film, 5.0, film) for film in (1, 2, 4)])


def test_a_user_who_leaves_no_negatives_is_refused(tmp_path):
    rows = [(user, film, 5.0, 100 * user + film) for user in (1, 2) for film in range(9, 39)]
    refused(tmp_path, "user 1 has rated nearly all", rows=rows, error=ValueError)


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExists, match="exists"):
        imported(tmp_path)
