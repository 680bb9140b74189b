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
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.csv
import tyro

from mim_torchrec import program
from mim_torchrec.data.errors import DataError, Location
from mim_torchrec.data.images import decode_image
from mim_torchrec.data.interactions import (
    Positives,
    Split,
    draw_negatives,
    moments,
    pairs_table,
    parts_of,
    requests_table,
)
from mim_torchrec.data.schema import (
    ITEMS,
    SPLITS,
    open_parquet,
    read_row_group,
)
from mim_torchrec.data.writing import DatasetWriter
from mim_torchrec.domains import Count, Domain, Natural, check_domains
from mim_torchrec.embeddings.remote.outputs import written
from mim_torchrec.embeddings.remote.places import LocalPath, Place

log = logging.getLogger("mim_torchrec.data.movielens")  # also where it runs as __main__

RATINGS = pa.schema([("userId", pa.int64()), ("movieId", pa.int64()), ("rating", pa.float64()),
                     ("timestamp", pa.int64())])  # fmt: skip
MOVIES = pa.schema([("movieId", pa.int64()), ("title", pa.string()), ("genres", pa.string())])
POSTERS = pa.schema([("movieId", pa.int64()), ("image", pa.binary())])
SECOND = 1_000_000  # microseconds
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
    split: Split = "user"
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


def find_likes(ratings: pa.Table, users: np.ndarray, films: np.ndarray, config: MovieLensConfig) -> Positives:
    """Positives of the films (ascending ids), divided into training, validation and test."""
    film_ids, ts = ratings["movieId"].to_numpy(), ratings["timestamp"].to_numpy()
    liked = np.flatnonzero((ratings["rating"].to_numpy() >= config.min_rating) & np.isin(film_ids, films))
    liked = liked[np.lexsort((film_ids[liked], ts[liked]))]
    user, ts = np.searchsorted(users, ratings["userId"].to_numpy()[liked]), ts[liked]
    part = parts_of(user, ts, config.split)
    missing = sorted(set(range(len(SPLITS))) - set(part.tolist()))
    if missing:
        problem = f"too few positives ({len(part)}): none for {SPLITS[missing[0]]}; lower --min-rating"
        raise DataError(problem, file=config.ratings / "ratings.csv")
    return Positives(user, np.searchsorted(films, film_ids[liked]), ts * SECOND, part)


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
        popularity = np.bincount(likes.item[likes.part == 0], minlength=len(films))
        draws, places = (np.random.default_rng((config.seed, k)) for k in (1, 2))
        negatives = draw_negatives(likes, seen, users, popularity, config.negatives, draws, "rated")
        genres = np.array([genre[film] for film in films.tolist()], dtype=object)

        requests = requests_table(likes, negatives, users, films, genres, config.max_behaviors, places)
        for part, name in enumerate(SPLITS):
            rows = np.flatnonzero(likes.part == part)
            writer.write(f"requests/{name}", requests.take(pa.array(rows)))
        writer.write("pairs", pairs_table(likes, films))
        images = pa.array([posters[film] for film in films.tolist()], pa.binary())
        titles = [title[film] for film in films.tolist()]
        writer.write(
            "items", pa.table([films, titles, images, genres, moments(first * SECOND)], schema=ITEMS)
        )
        writer.description["films_without_title_or_poster"] = len(rated) - len(films)
        writer.description["ratings_of_these_films"] = float(known.mean())
    return dict(writer.description["counts"])


def _first_rating(ratings: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the rated films, ascending, and the time of each one's first rating in seconds."""
    film, ts = ratings["movieId"].to_numpy(), ratings["timestamp"].to_numpy()
    order = np.lexsort((ts, film))
    films, first = np.unique(film[order], return_index=True)
    return films, ts[order][first]


def _first(flags: pa.ChunkedArray) -> int:
    return int(np.flatnonzero(flags.to_numpy())[0])


def main(argv: list[str] | None = None) -> None:
    """Entry point of `mim import movielens`."""
    config = tyro.cli(MovieLensConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    counts = convert(config)
    log.info("%s: %s", config.out, ", ".join(f"{count} in {folder}" for folder, count in counts.items()))


if __name__ == "__main__":
    program.run(main)
