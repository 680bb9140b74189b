"""What OpenAPI says of the server besides its routes: bodies of inference, errors, and who may ask."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from mim_torchrec.serving.bodies import HEADER_LENGTH
from mim_torchrec.serving.descriptions import Error
from mim_torchrec.serving.guards import OPEN
from mim_torchrec.serving.protocol import InferRequest

Responses = dict[int | str, dict[str, Any]]
_REFERENCE = "#/components/schemas/{model}"
_OF_FASTAPI = ("HTTPValidationError", "ValidationError")
_LENGTH = {
    "name": HEADER_LENGTH, "in": "header", "required": False, "schema": {"type": "integer", "minimum": 1},
    "description": "Bytes of JSON at the beginning of the body, where bytes of tensors follow.",
}  # fmt: skip
INFER_BODY = {
    "parameters": [_LENGTH],
    "requestBody": {
        "required": True,
        "description": "Any Content-Type is taken. Content-Encoding is gzip, deflate or none.",
        "content": {
            "application/json": {"schema": {"$ref": _REFERENCE.format(model="InferRequest")}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    },
}


class _Errors:
    """Answers to what is wrong, by status."""

    said = {
        400: "The request cannot be scored.",
        401: "The token is missing or wrong.",
        404: "There is no such model or version.",
        408: "The body did not arrive in time.",
        409: "The vectors are of another version than was asked for.",
        413: "The request is too large.",
        415: "The body is compressed in a way that the server does not know.",
        500: "An error that the server did not expect.",
        503: "Too many requests wait, or a store does not answer.",
        504: "The request was not scored before its deadline.",
    }

    def of(self, *statuses: int) -> Responses:
        """Those of some statuses."""
        return {status: {"model": Error, "description": self.said[status]} for status in statuses}

    @property
    def all(self) -> Responses:
        """Those of all statuses."""
        return self.of(*self.said)


ERRORS = _Errors()
UNREADY: Responses = {503: {"model": Error, "description": "Not ready, and why."}}


def describe(app: FastAPI, *, needs_token: bool) -> None:
    """Let an application describe itself.

    Args:
        app: the application.
        needs_token: whether requests must carry a token.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes,
                               description="Scores by the Open Inference Protocol v2.")  # fmt: skip
            for path, operations in made["paths"].items():
                for operation in operations.values():
                    _name_answers(operation["responses"], needs_token and path not in OPEN)
            _, found = models_json_schema([(InferRequest, "validation")], ref_template=_REFERENCE)
            parts = made.setdefault("components", {})
            parts.setdefault("schemas", {}).update(found["$defs"])
            for unused in _OF_FASTAPI:
                parts["schemas"].pop(unused, None)
            parts["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer", "description": "A token of --token-file."}
            }
            made["security"] = [{"bearer": []}] if needs_token else [{}, {"bearer": []}]
            for path in OPEN:
                made["paths"][path]["get"]["security"] = []
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's manual does


def _name_answers(responses: dict[str, Any], needs_token: bool) -> None:
    """Name the answers that any route may give, and not the one that none gives."""
    responses.pop("422", None)  # FastAPI names it of every route with a name in its path
    for status in (401, 500) if needs_token else (500,):
        schema = {"schema": {"$ref": _REFERENCE.format(model=Error.__name__)}}
        answer = {"description": ERRORS.said[status], "content": {"application/json": schema}}
        responses.setdefault(str(status), answer)
