"""The page for people: choose a user and see the history, the ranked candidates and the reasons."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException

from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import (
    ORIGINAL,
    REQUESTS,
    REQUESTS_REQUIRED,
    TIME,
    Dataset,
    open_parquet,
    present_columns,
    read_row_group,
)
from mim_torchrec.data.schema import category_ids as hashed
from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.serving.scorer import ScoreRequest, Scores
from mim_torchrec.serving.service import Service

HTML = Path(__file__).with_name("page.html")
USERS = 200
SHOWN = 24
ALIKE = 3
Score = Callable[..., Awaitable[Scores]]


class Page:
    """Test requests of a dataset, scored when a person opens them.

    Args:
        data: directory of the data set.
        cache: folder for the index of its items.
        service: what is served.
    """

    def __init__(self, data: Path | Url, cache: Path, service: Service) -> None:
        dataset = Dataset(data)
        self._items = ItemStore.open(dataset, cache)
        self._row_of = {int(item): row for row, item in enumerate(self._items.item_ids)}
        self._service = service
        # ids are text for the page: JavaScript would round large integers
        newest = {str(row.get(f"user_id{ORIGINAL}", row["user_id"])): row for row in _some_requests(dataset)}
        self._requests = dict(list(newest.items())[:USERS])

    def __call__(self, app: FastAPI, score: Score) -> None:
        """Add the page's addresses to an application."""

        @app.get("/", response_class=HTMLResponse, include_in_schema=False)
        async def index() -> str:
            return HTML.read_text(encoding="utf-8")

        @app.get("/demo/users", include_in_schema=False)
        async def users() -> list[dict[str, str | int]]:
            return [{"user_id": user, "behaviors": len(row["behavior_item_ids"])}
                    for user, row in self._requests.items()]  # fmt: skip

        @app.get("/demo/users/{user:path}", include_in_schema=False)
        async def user(user: str) -> dict[str, Any]:
            if user not in self._requests:
                raise HTTPException(404, f"there is no user {user}")
            return {"user_id": user, **await self._ranked(self._requests[user], score)}

        @app.get("/demo/items/{item}/image", include_in_schema=False)
        async def image(item: int) -> Response:
            if item not in self._row_of:
                raise HTTPException(404, f"there is no item {item}")
            row = torch.tensor([self._row_of[item]]).numpy()
            (data,) = await asyncio.to_thread(self._items.image_bytes, row)
            kind = "image/png" if data[:4] == b"\x89PNG" else "image/jpeg"
            return Response(data, media_type=kind, headers={"Cache-Control": "max-age=3600"})

    async def _ranked(self, row: dict[str, Any], score: Score) -> dict[str, Any]:
        served = self._service.current
        candidates, behaviors = row["candidate_item_ids"], row["behavior_item_ids"]
        found = await score(served.scorer, self._request(row))
        alike: list[list[dict[str, Any]]] = [[] for _ in candidates]
        if served.scorer.mm is not None:
            sent, history = torch.tensor(candidates), torch.tensor(behaviors)
            places, cosines = await asyncio.to_thread(served.scorer.nearest, sent, history, ALIKE)
            alike = [
                [
                    {"item_id": str(behaviors[place]), "cosine": cosine}
                    for place, cosine in zip(*pair, strict=True)
                ]
                for pair in zip(places.tolist(), cosines.tolist(), strict=True)
            ]
        contribution = found.contribution if found.contribution is not None else torch.zeros(len(candidates))
        ranked = sorted(range(len(candidates)), key=lambda k: -float(found.scores[k]))[:SHOWN]
        return {
            "model_version": served.model_version,
            "table_version": served.scorer.bundle.table_version,
            "history": [self._about(item) for item in reversed(behaviors[-SHOWN:])],
            "candidates": [
                self._about(candidates[k])
                | {"score": float(found.scores[k]), "contribution": float(contribution[k]), "alike": alike[k],
                   "clicked": bool(row["labels"][k])}
                for k in ranked
            ],
        }  # fmt: skip

    def _request(self, row: dict[str, Any]) -> ScoreRequest:
        scorer = self._service.current.scorer
        ids: dict[str, Any] = {"user_id": [row["user_id"]]}
        if "query_id" in scorer.of_requests:
            ids["query_id"] = [row["query_id"]]
        for role in ("candidate", "behavior"):
            ids[f"{role}_item_id"] = row[f"{role}_item_ids"]
            if "category" in scorer.of_items:
                ids[f"{role}_category"] = hashed(pa.array(row[f"{role}_categories"])).copy()
        times = row.get("behavior_ts")
        return ScoreRequest(
            ids={name: torch.as_tensor(values, dtype=torch.int64) for name, values in ids.items()},
            request_ts=_micro(row["ts"]) if row.get("ts") else None,
            behavior_ts=torch.tensor([_micro(t) for t in times]) if times else None,
            contribution=scorer.mm is not None,
        )

    def _about(self, item: int) -> dict[str, Any]:
        row = self._row_of.get(item)
        where = torch.tensor([row]).numpy() if row is not None else None
        title = self._items.titles(where)[0] if where is not None else "unknown item"
        return {"item_id": str(item), "title": title, "known": where is not None}


def _some_requests(dataset: Dataset) -> list[dict[str, Any]]:
    """Rows of the first test requests that have behaviors, the oldest first."""
    for file in dataset.requests("test"):
        parquet = open_parquet(file, REQUESTS, REQUESTS_REQUIRED, dataset.conventions, originals=True)
        if not parquet.is_empty:
            rows = read_row_group(parquet, 0, present_columns(parquet, REQUESTS), file).to_pylist()
            return [row for row in rows if row["behavior_item_ids"]]
    return []


def _micro(moment: Any) -> int:
    return pa.scalar(moment, TIME).value
