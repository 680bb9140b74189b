"""The addresses of the page: users, a ranking with its reasons, pictures, and where a new item would rank."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import Dataset
from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.serving.messages import Scores
from mim_torchrec.serving.page.likeness import Likeness
from mim_torchrec.serving.page.new_item import ItemEncoder, why_not
from mim_torchrec.serving.page.ranking import Catalog, NewItem, ranked
from mim_torchrec.serving.page.users import Users
from mim_torchrec.serving.scorer import Scorer
from mim_torchrec.serving.service import Served, Service

FILES = {"page.css": "text/css", "page.js": "text/javascript"}
USERS = 200
CATEGORIES = 500
Score = Callable[..., Awaitable[Scores]]


class Page:
    """Test requests of a dataset, scored when a person opens them.

    Args:
        data: directory of the data set.
        cache: folder for the index of its items.
        service: what is served.
        explain_pairs: pairs of candidate and behavior that an explanation may take; more is not explained.
        encoder: of the table, for items that are not there yet; None where the server has none.
    """

    def __init__(
        self,
        data: Path | Url,
        cache: Path,
        service: Service,
        explain_pairs: int,
        encoder: ItemEncoder | None = None,
    ) -> None:
        self._dataset = Dataset(data)
        self._catalog = Catalog(ItemStore.open(self._dataset, cache))
        self._categories = self._catalog.categories(CATEGORIES)
        self._service, self._explained, self._encoder = service, explain_pairs, encoder
        self._making = threading.Lock()
        self._users = Users(self._dataset, service.current.scorer.features)
        self._likeness: tuple[Scorer, Likeness | None] | None = None

    def _users_of(self, served: Served) -> Users:
        """The users of the log, read with the features of the model that is served.

        Raises:
            HTTPException: the data set lacks one of them.
        """
        with self._making:
            if self._users.features != served.scorer.features:
                try:
                    self._users = Users(self._dataset, served.scorer.features)
                except DataError as error:  # a model was promoted that reads what the data set has not
                    raise HTTPException(409, str(error)) from None
            return self._users

    def _likeness_of(self, scorer: Scorer) -> Likeness | None:
        with self._making:
            if self._likeness is None or self._likeness[0] is not scorer:
                made = None if scorer.mm is None else Likeness(scorer.mm, self._catalog.items.item_ids)
                self._likeness = scorer, made
            return self._likeness[1]

    def __call__(self, app: FastAPI, score: Score) -> None:
        """Add the page's addresses to an application."""

        @app.get("/", response_class=HTMLResponse, include_in_schema=False)
        async def index() -> str:
            return _read("page.html")

        @app.get("/demo/{name}.{kind}", include_in_schema=False)
        async def file(name: str, kind: str) -> Response:
            if (full := f"{name}.{kind}") not in FILES:
                raise HTTPException(404, f"there is no file {full}")
            return Response(_read(full), media_type=FILES[full])

        @app.get("/demo/about", include_in_schema=False)
        async def about() -> dict[str, Any]:
            problem = why_not(self._encoder, self._service.current.scorer)
            return {"what_if_problem": problem, "categories": self._categories}

        @app.get("/demo/users", include_in_schema=False)
        async def users(search: str = "") -> dict[str, Any]:
            known = await asyncio.to_thread(self._users_of, self._service.current)
            return {"users": known.search(search.strip(), USERS), "count": len(known)}

        @app.get("/demo/users/{user:path}", include_in_schema=False)
        async def user(user: str) -> dict[str, Any]:
            return await self._shown(user, score, None)

        @app.post("/demo/what-if", include_in_schema=False)
        async def what_if(request: Request, user: str, title: str, category: str = "") -> dict[str, Any]:
            problem = why_not(self._encoder, self._service.current.scorer)
            if problem is not None or self._encoder is None:
                raise HTTPException(409, problem)
            vector = await self._encoder.encode(await request.body(), title)
            return await self._shown(user, score, NewItem(title, category, vector))

        @app.get("/demo/items/{item}/image", include_in_schema=False)
        async def image(item: int) -> Response:
            data = await asyncio.to_thread(self._catalog.image, item)
            if data is None:
                raise HTTPException(404, f"there is no picture of an item {item}")
            kind = "image/png" if data[:4] == b"\x89PNG" else "image/jpeg"
            return Response(data, media_type=kind, headers={"Cache-Control": "max-age=3600"})

    async def _shown(self, user: str, score: Score, new: NewItem | None) -> dict[str, Any]:
        served = self._service.current
        known = await asyncio.to_thread(self._users_of, served)
        try:
            logged = await asyncio.to_thread(known.request_of, user)
        except KeyError:
            raise HTTPException(404, f"there is no user {user} with behaviors in the test requests") from None
        likeness = await asyncio.to_thread(self._likeness_of, served.scorer)
        found = await ranked(served.scorer, logged, score, self._catalog, likeness, self._explained, new)
        return {"user_id": user, "model_version": served.model_version,
                "table_version": served.scorer.bundle.table_version, **found}  # fmt: skip


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
