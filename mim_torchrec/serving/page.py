"""The page for people: choose a user and see the history, the ranked candidates and the reasons."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.features import Features
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import Dataset
from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.serving.logged import LoggedRequest, read_log
from mim_torchrec.serving.messages import Explanation, Scores
from mim_torchrec.serving.service import Service

HTML = Path(__file__).with_name("page.html")
USERS = 200
ROWS = 20_000  # requests that users are looked for in
SHOWN = 24
ALIKE = 3
Score = Callable[..., Awaitable[Scores]]


class Page:
    """Test requests of a dataset, scored when a person opens them.

    Args:
        data: directory of the data set.
        cache: folder for the index of its items.
        service: what is served.
        explain_pairs: pairs of candidate and behavior that an explanation may take; more is not explained.
    """

    def __init__(self, data: Path | Url, cache: Path, service: Service, explain_pairs: int) -> None:
        dataset = Dataset(data)
        self._items = ItemStore.open(dataset, cache)
        self._row_of = {int(item): row for row, item in enumerate(self._items.item_ids)}
        self._dataset, self._service, self._explained = dataset, service, explain_pairs
        self._read: tuple[Features, dict[str, LoggedRequest]] | None = None
        self._logged()

    def _logged(self) -> dict[str, LoggedRequest]:
        """The newest request of each user, with the features of the model that is served.

        Raises:
            DataError: the data set lacks one of them.
        """
        features = self._service.current.scorer.features
        if self._read is None or self._read[0] != features:
            # ids are text for the page: JavaScript would round large integers
            logged = islice(read_log(self._dataset, "test", features), ROWS)
            newest = {one.known_as("user_id"): one for one in logged if len(one.behaviors)}
            self._read = features, dict(list(newest.items())[:USERS])
        return self._read[1]

    def __call__(self, app: FastAPI, score: Score) -> None:
        """Add the page's addresses to an application."""

        def logged() -> dict[str, LoggedRequest]:
            try:
                return self._logged()
            except DataError as error:  # a model was promoted that reads what the data set has not
                raise HTTPException(409, str(error)) from None

        @app.get("/", response_class=HTMLResponse, include_in_schema=False)
        async def index() -> str:
            return HTML.read_text(encoding="utf-8")

        @app.get("/demo/users", include_in_schema=False)
        async def users() -> list[dict[str, str | int]]:
            return [{"user_id": user, "behaviors": len(one.behaviors)}
                    for user, one in logged().items()]  # fmt: skip

        @app.get("/demo/users/{user:path}", include_in_schema=False)
        async def user(user: str) -> dict[str, Any]:
            if user not in logged():
                raise HTTPException(404, f"there is no user {user}")
            return {"user_id": user, **await self._ranked(logged()[user], score)}

        @app.get("/demo/items/{item}/image", include_in_schema=False)
        async def image(item: int) -> Response:
            if item not in self._row_of:
                raise HTTPException(404, f"there is no item {item}")
            row = torch.tensor([self._row_of[item]]).numpy()
            (data,) = await asyncio.to_thread(self._items.image_bytes, row)
            kind = "image/png" if data[:4] == b"\x89PNG" else "image/jpeg"
            return Response(data, media_type=kind, headers={"Cache-Control": "max-age=3600"})

    async def _ranked(self, logged: LoggedRequest, score: Score) -> dict[str, Any]:
        served = self._service.current
        scorer, behaviors = served.scorer, logged.behaviors.tolist()
        asked = logged.asked(scorer, contribution=scorer.mm is not None, explain=True)
        if scorer.recent(asked).num_pairs > self._explained:
            asked = replace(asked, explain=False)
        found = await score(scorer, asked)
        explanation, count = found.explanation, asked.num_candidates
        alike: list[list[dict[str, Any]]] = [[] for _ in range(count)]
        if scorer.mm is not None:
            ids = asked.ids["candidate_item_id"], asked.ids["behavior_item_id"]
            relevance = await asyncio.to_thread(scorer.relevance, *ids)
            nearest = relevance.topk(min(ALIKE, len(behaviors)), dim=1)
            alike = [
                [
                    {"item_id": str(behaviors[place]), "cosine": cosine}
                    for place, cosine in zip(*pair, strict=True)
                ]
                for pair in zip(nearest.indices.tolist(), nearest.values.tolist(), strict=True)
            ]
        contribution = found.contribution if found.contribution is not None else torch.zeros(count)
        interests = {} if explanation is None else explanation.interests
        ranked = sorted(range(count), key=lambda k: -float(found.scores[k]))[:SHOWN]
        return {
            "model_version": served.model_version,
            "table_version": scorer.bundle.table_version,
            "history": [self._about(item) for item in reversed(behaviors[-SHOWN:])],
            "candidates": [
                self._about(int(logged.candidates[k]))
                | {"score": float(found.scores[k]), "contribution": float(contribution[k]), "alike": alike[k],
                   "clicked": logged.clicked[k],
                   "interests": {name: float(lost[k]) for name, lost in interests.items()},
                   "because": self._because(behaviors, explanation, k)}
                for k in ranked
            ],
        }  # fmt: skip

    def _because(self, behaviors: list[int], found: Explanation | None, k: int) -> list[dict[str, Any]]:
        """The behaviors without which the logit of a candidate would fall most."""
        if found is None:
            return []
        used = behaviors[len(behaviors) - found.behaviors.shape[1] :]
        largest = found.behaviors[k].topk(min(ALIKE, len(used)))
        pairs = zip(largest.indices.tolist(), largest.values.tolist(), strict=True)
        return [self._about(used[place]) | {"lost": value} for place, value in pairs if value > 0]

    def _about(self, item: int) -> dict[str, Any]:
        row = self._row_of.get(item)
        where = torch.tensor([row]).numpy() if row is not None else None
        title = self._items.titles(where)[0] if where is not None else "unknown item"
        return {"item_id": str(item), "title": title, "known": where is not None}
