"""The review page's routes: page, pictures, state, one call, and the signature. Everything comes from memory.

No route takes a path of a file, and no answer before the signature depends on what is a pair and what a decoy.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from importlib.resources import files
from typing import Any, Literal

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from jinja2 import Environment, StrictUndefined
from pydantic import BaseModel, ConfigDict

from pixcell_core.errors import BadInputError, PixcellError
from privacy_audit.review.door import Door
from privacy_audit.review.session import ReviewSession
from privacy_audit.review_queue import Call, ItemId

_PNG = b"\x89PNG\r\n\x1a\n"
_PAGE = files("privacy_audit.review") / "page"


class CallBody(BaseModel):
    """One call, as the page sends it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: ItemId
    call: Call


class SignBody(BaseModel):
    """The wish to sign. Its one word keeps an accidental request from signing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sign: Literal["all"]


def build_app(
    session: ReviewSession,
    *,
    token: str,
    port: int,
    on_request: Callable[[], None] = lambda: None,
    on_signed: Callable[[], None] = lambda: None,
) -> Door:
    """The whole application behind its door.

    Args:
        on_request: called for each request that passed the door. on_signed: called once the signature is on disk.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    router = APIRouter(prefix=f"/{token}")
    pictures = _pictures(session)
    order = [item.id for item in session.queue.items]
    asks = {item.id: item.asks for item in session.queue.items}
    page = _render(session, len(order))

    @router.get("/")
    async def show() -> Response:
        return HTMLResponse(page)

    @router.get("/review.css")
    async def style() -> Response:
        return Response(_text("review.css"), media_type="text/css")

    @router.get("/review.js")
    async def script() -> Response:
        return Response(_text("review.js"), media_type="text/javascript")

    @router.get("/review.svg")
    async def icon() -> Response:
        return Response(_text("review.svg"), media_type="image/svg+xml")

    @router.get("/state")
    async def state() -> dict[str, Any]:
        return {"items": order, "asks": asks, "calls": session.calls, "result": _result(session)}

    @router.get("/tile/{item}/{side}.png")
    async def tile(item: str, side: str) -> Response:
        found = pictures.get((item, side))
        if found is None:
            return JSONResponse({"code": "no-such-item", "message": "The queue has no such picture."}, 404)
        return Response(found, media_type="image/png")

    @router.post("/call")
    async def call(body: CallBody) -> dict[str, Any]:
        session.decide(body.id, body.call)
        return {"decided": len(session.calls), "open": session.open}

    @router.post("/sign")
    async def sign(body: SignBody) -> dict[str, Any]:
        session.sign()
        on_signed()
        return {"result": _result(session)}

    @app.exception_handler(PixcellError)
    async def refused(request: Request, error: PixcellError) -> Response:
        status = 404 if error.code == "no-such-item" else 400 if isinstance(error, BadInputError) else 409
        return JSONResponse({"code": error.code, "message": error.message, "hint": error.hint}, status)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        # The input is not echoed: this answer, too, is read by nobody but the page.
        return JSONResponse(
            {"code": "bad-call", "message": "That is no call.", "hint": "Reload the page."}, 422
        )

    @app.middleware("http")
    async def heard(request: Request, call_next: Any) -> Response:
        on_request()
        answer: Response = await call_next(request)
        return answer

    app.include_router(router)
    return Door(app, token=token, port=port)


def _pictures(session: ReviewSession) -> dict[tuple[str, str], bytes]:
    """Every picture of the queue by item and side; refuses what is no PNG before a browser sees it."""
    found: dict[tuple[str, str], bytes] = {}
    for item in session.queue.items:
        for side, uri in (("left", item.left), ("right", item.right)):
            if uri is None:
                continue
            try:
                data = base64.b64decode(uri.partition(",")[2], validate=True)
            except ValueError:
                data = b""
            if not data.startswith(_PNG):
                raise BadInputError(
                    f"A picture of item {item.id} is no PNG.",
                    hint="The queue was damaged. Run the audit again.",
                    code="bad-review-queue",
                )
            found[item.id, side] = data
    return found


def _result(session: ReviewSession) -> dict[str, Any] | None:
    record = session.signed
    if record is None:
        return None
    return {
        "pairs": record.pairs.model_dump(),
        "decoys": record.decoys.model_dump(),
        "marks": record.marks.model_dump() if record.marks else None,
        "clean": record.clean.model_dump() if record.clean else None,
        "decoy_agreement": record.decoy_agreement,
        "decoy_interval": record.decoy_interval,
        "decisions": session.decisions_file.name,
    }


def _render(session: ReviewSession, total: int) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_text("review.html.j2")).render(
        questions=session.queue.questions, mark=session.queue.mark, user=session.user, total=total
    )


def _text(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")
