"""Plain HTTP routes of the page: drawing by one JSON call, what can be chosen, the schema, and all pictures of a user."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ldm.config.errors import UserError
from ldm.demo.api import schema
from ldm.demo.guard import USER
from ldm.demo.page import Page
from ldm.demo.studio import Busy

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response


def add_routes(app: FastAPI, page: Page) -> None:
    """The plain routes: /api/draw, /api/schema, /api/models, /api/gallery.zip."""
    from starlette.responses import FileResponse, JSONResponse

    async def draw(request: HttpRequest) -> Response:
        try:
            values = json.loads(await request.body())
            return JSONResponse(await page.draw(values, _user(request), request.is_disconnected))
        except UserError as error:
            return JSONResponse({"error": str(error)}, 429 if isinstance(error, Busy) else 422)

    async def models(request: HttpRequest) -> Response:
        found = page.catalogue
        return JSONResponse({"models": list(found.models()), "loras": list(found.loras()), "vaes": list(found.vaes())})

    async def described(request: HttpRequest) -> Response:
        return JSONResponse(schema())

    async def gallery(request: HttpRequest) -> Response:
        try:
            return FileResponse(page.shelf.packed(_user(request)), filename="pictures.zip")
        except UserError as error:
            return JSONResponse({"error": str(error)}, 404)

    app.add_route("/api/draw", draw, ["POST"])
    app.add_route("/api/models", models, ["GET"])
    app.add_route("/api/schema", described, ["GET"])
    app.add_route("/api/gallery.zip", gallery, ["GET"])


def _user(request: HttpRequest) -> str:
    return str(request.cookies.get(USER, ""))
