"""MovieLens and posters in the schema of a shop (`mim import movielens`).

A rating of 4 or more is a positive. Each becomes a request: the positive among films that the user has never
rated, drawn by their popularity in the training part, with the user's earlier positives as history. A request
of the training part and the positive before it make a pair for C-SFT: the poster of a liked film stands
for the image that was searched with, the next liked film for what was bought.

Only films with a title, a poster and a rating take part. A film is listed at its first rating, and its
category is its first genre. Ratings below 4 only keep a film out of the negatives.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import tyro

from mim_torchrec import program
from mim_torchrec.data.errors import DataError, Location
from mim_torchrec.data.histories import histories
from mim_torchrec.data.images import decode_image
from mim_torchrec.data.schema import (
    ITEMS,
    PAIRS,
    REQUESTS,
    SPLITS,
    TIME,
    open_parquet,
    read_row_group,
)
from mim_torchrec.data.writing import DatasetWriter, lists
from mim_torchrec.domains import Count, Domain, Natural, check_domains
from mim_torchrec.embeddings.remote.outputs import written
from mim_torchrec.embeddings.remote.places import LocalPath, Place
from mim_torchrec.errors import OptionError

log = logging.getLogger(__name__)

RATINGS = pa.schema([("userId", pa.int64()), ("movieId", pa.int64()), ("rating", pa.float64()),
                     ("timestamp", pa.int64())])  # fmt: skip
MOVIES = pa.schema([("movieId", pa.int64()), ("title", pa.string()), ("genres", pa.string())])
POSTERS = pa.schema([("movieId", pa.int64()), ("image", pa.binary())])
SECOND = 1_000_000  # microseconds
MOST_DRAWS = 1000
INPUTS = ("ratings", "posters", "out")


@dataclass(frozen=True, kw_only=True)
class MovieLensConfig:
    """Convert MovieLens and posters: films as items, ratings of 4 and more as clicks."""

    ratings: LocalPath
    """Folder with ratings.csv and movies.csv, as GroupLens publishes them."""
    posters: LocalPath
    """Parquet file of posters: movieId and image (JPEG, PNG or WebP bytes)."""
    out: Place
    """Directory to make; must not exist."""
    split: Literal["user", "global"] = "user"
    """How positives are divided by time into train, validation and test (80, 10, 10 percent): those of every
    user, or those of all users at two common times."""
    min_rating: Annotated[float, Domain()] = 4.0
    """Lowest rating that is a positive."""
    negatives: Count = 4
    """Negatives of a request."""
    max_behaviors: Count = 50
    """Longest history of a request."""
    seed: Natural = 0
    """Seed of the negatives."""


@dataclass(frozen=True)
class Likes:
    """Positives in order of time: positions of user and film, ts (seconds), part (0, 1, 2), each (n,)."""

    user: np.ndarray
    film: np.ndarray
    ts: np.ndarray
    part: np.ndarray


def read_csv(file: Path, expected: pa.Schema) -> pa.Table:
    """Columns of a CSV file, without missing values.

    Raises:
        DataError: the file is missing, empty or without a column, or a value is missing or of a wrong type.
    """
    if not file.is_file():
        raise DataError("no such file; --ratings is the folder of ratings.csv and movies.csv", file=file)
    try:
        table = pyarrow.csv.read_csv(
            file,
            read_options=pyarrow.csv.ReadOptions(use_threads=False),  # else errors do not name the row
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=expected.names,
                column_types=expected,
                null_values=[""],  # a film may be called Null
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
    except (pa.ArrowException, OSError) as error:
        problem = f"not a readable CSV file with columns {', '.join(expected.names)} ({error})"
        raise DataError(f"{problem}; unpack it from the archive again", file=file) from None
    if not len(table):
        raise DataError("the file has no rows; unpack it from the archive again", file=file)
    for name in expected.names:
        if table[name].null_count:
            raise DataError(
                "is empty; fill it in, or leave the row out",
                file=file,
                row=_first(table[name].is_null()),
                column=name,
            )
    return table


def read_posters(file: Path) -> dict[int, bytes]:
    """Posters by film, each of which can be decoded.

    Raises:
        DataError: the file is malformed, a value is null, an image is damaged, or a film is there twice.
    """
    parquet = open_parquet(file, POSTERS, POSTERS.names)
    posters: dict[int, bytes] = {}
    for group in range(parquet.num_row_groups):
        table = read_row_group(parquet, group, POSTERS.names, file)
        for name in POSTERS.names:
            if table[name].null_count:
                raise DataError(
                    "is null; fill it in, or leave the row out",
                    file,
                    group,
                    _first(table[name].is_null()),
                    name,
                )
        films, images = table["movieId"].to_pylist(), table["image"].to_pylist()
        for row, (film, image) in enumerate(zip(films, images, strict=True)):
            if film in posters:
                raise DataError(
                    f"film {film} is there twice; remove one of the rows", file, group, row, "movieId"
                )
            decode_image(image, Location(file, group, row, "image"))
            posters[film] = image
    return posters


def find_likes(ratings: pa.Table, users: np.ndarray, films: np.ndarray, config: MovieLensConfig) -> Likes:
    """Positives of the films (ascending ids), divided into training, validation and test."""
    film_ids, ts = ratings["movieId"].to_numpy(), ratings["timestamp"].to_numpy()
    liked = np.flatnonzero((ratings["rating"].to_numpy() >= config.min_rating) & np.isin(film_ids, films))
    liked = liked[np.lexsort((film_ids[liked], ts[liked]))]
    user, ts = np.searchsorted(users, ratings["userId"].to_numpy()[liked]), ts[liked]
    if config.split == "user":
        count = np.bincount(user, minlength=len(users))
        by_user = np.argsort(user, kind="stable")
        place = np.empty(len(user), np.int64)
        place[by_user] = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
        of = count[user]
    else:
        place = np.searchsorted(ts, ts)  # those of one moment stay together
        of = np.full(len(ts), len(ts))
    part = (place >= of * 8 // 10).astype(np.int64) + (place >= of * 9 // 10)
    missing = sorted(set(range(len(SPLITS))) - set(part.tolist()))
    if missing:
        problem = f"too few positives ({len(part)}): none for {SPLITS[missing[0]]}; lower --min-rating"
        raise DataError(problem, file=config.ratings / "ratings.csv")
    return Likes(user, np.searchsorted(films, film_ids[liked]), ts, part)


def draw_negatives(
    likes: Likes,
    seen: np.ndarray,
    users: np.ndarray,
    num_films: int,
    count: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Films that the user of each positive has not rated, by their number of training positives.

    Args:
        likes: n positives.
        seen: (num_ratings,) user * num_films + film of every rating.
        users: ids of the users, for the message.
        num_films: number of films.
        count: how many, all different.
        rng: source of the draws.

    Returns:
        (n, count).

    Raises:
        OptionError: a user has rated too many films to leave that many.
    """
    popularity = np.bincount(likes.film[likes.part == 0], minlength=num_films)
    cumulative = np.cumsum(popularity)
    seen = np.unique(seen)
    drawn = np.full((len(likes.user), count), -1)
    todo = np.ones(drawn.shape, bool)
    for _ in range(MOST_DRAWS):
        point = rng.integers(cumulative[-1], size=int(todo.sum()))
        drawn[todo] = np.searchsorted(cumulative, point, side="right")
        key = likes.user[:, None] * num_films + drawn
        position = np.searchsorted(seen, key).clip(max=len(seen) - 1)
        todo = seen[position] == key
        for k in range(1, count):
            todo[:, k] |= (drawn[:, :k] == drawn[:, k : k + 1]).any(axis=1)
        if not todo.any():
            return drawn
    user = users[likes.user[np.flatnonzero(todo.any(axis=1))[0]]]
    raise OptionError(
        f"user {user} has rated nearly all liked films: {count} negatives are not left; lower --negatives"
    )


def requests_table(
    likes: Likes,
    negatives: np.ndarray,
    users: np.ndarray,
    films: np.ndarray,
    genres: np.ndarray,
    config: MovieLensConfig,
) -> pa.Table:
    """One request a positive, in order of time; the positive is at a random place among the candidates."""
    rng = np.random.default_rng((config.seed, 2))
    count, shown = len(likes.user), config.negatives + 1
    place = rng.permuted(np.tile(np.arange(shown), (count, 1)), axis=1)
    candidates = np.take_along_axis(np.column_stack([likes.film, negatives]), place, axis=1).reshape(-1)
    lengths, behaviors, behavior_ts = histories(
        likes.user, likes.film, likes.ts, likes.user, likes.ts, config.max_behaviors
    )
    names = [name for name in REQUESTS.names if name != "query_id"]
    columns = {
        "request_id": pa.array(np.arange(1, count + 1)),
        "user_id": users[likes.user],
        "ts": _time(likes.ts),
        "behavior_item_ids": lists(films[behaviors], lengths, pa.int64()),
        "behavior_categories": lists(genres[behaviors], lengths, pa.string()),
        "behavior_ts": lists(_time(behavior_ts), lengths, TIME),
        "candidate_item_ids": lists(films[candidates], np.full(count, shown), pa.int64()),
        "candidate_categories": lists(genres[candidates], np.full(count, shown), pa.string()),
        "labels": lists((place == 0).reshape(-1).astype(np.int8), np.full(count, shown), pa.int8()),
    }
    return pa.table([columns[name] for name in names], schema=pa.schema([REQUESTS.field(n) for n in names]))


def pairs_table(likes: Likes, films: np.ndarray) -> pa.Table:
    """Each training positive but a user's first, with the one before it as the query."""
    train = np.flatnonzero(likes.part == 0)
    by_user = train[np.argsort(likes.user[train], kind="stable")]
    same = likes.user[by_user[1:]] == likes.user[by_user[:-1]]
    bought = by_user[1:][same]
    order = np.argsort(bought, kind="stable")  # likes are in order of time
    bought, query = bought[order], by_user[:-1][same][order]
    nothing = pa.nulls(len(bought), pa.binary())
    return pa.table(
        [
            nothing,
            films[likes.film[query]],
            films[likes.film[bought]],
            pa.nulls(len(bought), pa.int64()),
            pa.array(["purchase"] * len(bought)),
            _time(likes.ts[bought]),
        ],
        schema=PAIRS,
    )


def convert(config: MovieLensConfig) -> dict[str, int]:
    """Write the data set; returns the counts of its folders.

    Raises:
        DataError: a file is malformed.
        OutputExists: `out` exists.
        OptionError: an option is impossible.
    """
    check_domains(config)
    options = {name: value for name, value in asdict(config).items() if name not in INPUTS}
    source = {"command": "mim import movielens", **options}
    with written(config.out) as out, DatasetWriter(out, name="movielens", source=source) as writer:
        ratings = read_csv(config.ratings / "ratings.csv", RATINGS)
        movies = read_csv(config.ratings / "movies.csv", MOVIES)
        posters = read_posters(config.posters)
        title = dict(zip(movies["movieId"].to_pylist(), movies["title"].to_pylist(), strict=True))
        genre = {film: text.split("|")[0] for film, text in
                 zip(movies["movieId"].to_pylist(), movies["genres"].to_pylist(), strict=True)}  # fmt: skip
        rated, first = _first_rating(ratings)
        takes_part = np.array([film in posters and film in title for film in rated.tolist()], bool)
        if not takes_part.any():
            raise DataError(
                "no film in it has a title and a poster; give posters of the same movieIds",
                file=config.ratings / "ratings.csv",
            )
        films, first = rated[takes_part], first[takes_part]
        users = np.unique(ratings["userId"].to_numpy())
        likes = find_likes(ratings, users, films, config)
        known = np.isin(ratings["movieId"].to_numpy(), films)
        seen = np.searchsorted(users, ratings["userId"].to_numpy()[known]) * len(films)
        seen += np.searchsorted(films, ratings["movieId"].to_numpy()[known])
        rng = np.random.default_rng((config.seed, 1))
        negatives = draw_negatives(likes, seen, users, len(films), config.negatives, rng)
        genres = np.array([genre[film] for film in films.tolist()], dtype=object)

        requests = requests_table(likes, negatives, users, films, genres, config)
        for part, name in enumerate(SPLITS):
            rows = np.flatnonzero(likes.part == part)
            writer.write(f"requests/{name}", requests.take(pa.array(rows)))
        writer.write("pairs", pairs_table(likes, films))
        images = pa.array([posters[film] for film in films.tolist()], pa.binary())
        titles = [title[film] for film in films.tolist()]
        writer.write("items", pa.table([films, titles, images, genres, _time(first)], schema=ITEMS))
        writer.description["films_without_title_or_poster"] = len(rated) - len(films)
        writer.description["ratings_of_these_films"] = float(known.mean())
    return dict(writer.description["counts"])


def _first_rating(ratings: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the rated films, ascending, and the time of each one's first rating in seconds."""
    film, ts = ratings["movieId"].to_numpy(), ratings["timestamp"].to_numpy()
    order = np.lexsort((ts, film))
    films, first = np.unique(film[order], return_index=True)
    return films, ts[order][first]


def _time(seconds: np.ndarray) -> pa.Array:
    return pa.array(seconds * SECOND).cast(TIME)


def _first(flags: pa.ChunkedArray) -> int:
    return int(np.flatnonzero(flags.to_numpy())[0])


def main(argv: list[str] | None = None) -> None:
    """Entry point of `mim import movielens`."""
    config = tyro.cli(MovieLensConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    program.log_to_stderr()
    counts = convert(config)
    log.info("%s: %s", config.out, ", ".join(f"{count} in {folder}" for folder, count in counts.items()))


if __name__ == "__main__":
    program.run(main)
