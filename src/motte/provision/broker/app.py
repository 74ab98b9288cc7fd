"""HTTP in front of a broker: seven doors, strict readers behind each, every refusal with its reason and never a 500."""

from __future__ import annotations

import html
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Final

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import HTMLResponse
from starlette.concurrency import run_in_threadpool

from motte.errors import FormatError, InputError, MotteError, ResourceError, TrustError
from motte.limits import MAX_AUDIT_PAGE, MAX_BROKER_REQUEST_BYTES, MAX_RELEASE
from motte.provision.broker import answers, enroll, log, training
from motte.provision.broker.state import Broker
from motte.provision.client import IDENTITY_FORMAT
from motte.provision.messages import ASK_FORMAT, PROOF_FORMAT
from motte.provision.registration import REGISTRATION_FORMAT
from motte.provision.runs import ACTIONS, REQUEST_FORMAT
from motte.provision.statements import sign
from motte.strict_json import canonical

_LOG = logging.getLogger("motte")
_FACTS: Final = ("check", "expected", "got", "where", "hint")
_ERROR: Final = {"$ref": "#/components/schemas/Refusal"}
_REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
    for status, text in (
        (400, "malformed, or a bound exceeded"),
        (403, "refused: `error.check` says which check of docs/spec/broker.md or docs/spec/evidence.md"),
        (413, "the request is too large"),
        (429, "too many nonces are open"),
        (503, "the broker lacks something: room on its disk, its token"),
    )
}


def _hex(count: int) -> dict[str, Any]:
    return {"type": "string", "pattern": f"^[0-9a-f]{{{2 * count}}}$"}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": sorted(properties), "additionalProperties": False}


_RELEASE: Final = {"type": "integer", "minimum": 0, "maximum": MAX_RELEASE}
_TARGET: Final = {"bundle_id": _hex(16), "header_digest": _hex(32), "release": _RELEASE}
_RESUME: Final = {"anyOf": [{"type": "null"}, _object(run=_hex(16), checkpoint=_RELEASE)]}
_BODIES: Final = {
    "Ask": _object(format={"const": ASK_FORMAT}, resume=_RESUME, **_TARGET),
    "Proof": _object(
        format={"const": PROOF_FORMAT},
        nonce=_hex(32),
        public_key=_hex(32),
        tls_spki_digest={"type": "string", "pattern": "^([0-9a-f]{64})?$"},
        configuration_digest=_hex(32),
        evidence={"type": "string", "contentEncoding": "base64"},
        **_TARGET,
    ),
    "RunRequest": _object(
        format={"const": REQUEST_FORMAT},
        lease=_hex(16),
        run=_hex(16),
        action={"enum": list(ACTIONS)},
        value={"type": "integer", "minimum": 1},
        echo=_hex(32),
        code=_hex(32),
    ),
    "Registration": _object(
        format={"const": REGISTRATION_FORMAT},
        broker=_hex(32),
        header={"type": "string"},
        model={"type": "string"},
        policy={"type": "string"},
        configurations={"type": "array", "items": _hex(32), "minItems": 1},
        min_release={"anyOf": [{"type": "null"}, _RELEASE]},
        lease_s={"type": "integer", "minimum": 1},
        signature=_hex(64),
    ),
    "Refusal": {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {name: {"type": "string"} for name in ("kind", "message", *_FACTS)},
                "required": ["kind", "message"],
            },
            "head": {"type": "object", "description": "the signed head, where the refusal stands in the log"},
        },
        "required": ["error"],
    },
}


class _TooLarge(Exception):
    pass


def make_app(broker: Broker) -> FastAPI:
    """The application; whoever serves it closes the broker."""
    app = FastAPI(
        title="motte key broker",
        version="1",
        description="Data keys for enclaves that proved themselves. Normative: docs/spec/broker.md.",
        docs_url=None,  # its page loads scripts from elsewhere; /docs below is ours
        redoc_url=None,
    )
    _add_posts(app, broker)
    _add_gets(app, broker)
    _add_schema(app)
    return app


def _add_posts(app: FastAPI, broker: Broker) -> None:
    def register(owner: Broker, data: bytes) -> bytes:
        return canonical(enroll.register_remote(owner, data).head_document)

    doors: tuple[tuple[str, str, str, Callable[[Broker, bytes], bytes]], ...] = (
        ("/v1/nonce", "Ask", "A nonce for a bundle, to make evidence over.", answers.ask),
        ("/v1/release", "Proof", "Data keys for evidence over a nonce, once.", answers.prove),
        ("/v1/run", "RunRequest", "Charge releases of a training run; its checkpoints' keys.", training.run_order),
        ("/v1/bundles", "Registration", "Give the broker one more release to hold.", register),
    )
    for path, body, summary, answer in doors:
        extra = {
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{body}"}}},
            }
        }
        app.add_api_route(
            path,
            _door(broker, answer),
            methods=["POST"],
            summary=summary,
            operation_id=body,
            responses=_REFUSALS,
            openapi_extra=extra,
        )


def _door(broker: Broker, answer: Callable[[Broker, bytes], bytes]) -> Callable[[Request], Awaitable[Response]]:
    async def door(request: Request) -> Response:
        return await _answered(lambda data: answer(broker, data), request)

    return door


async def _answered(answer: Callable[[bytes], bytes], request: Request) -> Response:
    try:
        data = await _body(request)
        return _json(200, await run_in_threadpool(answer, data))
    except _TooLarge:
        return _refusal(413, InputError("too large", expected=f"at most {MAX_BROKER_REQUEST_BYTES} bytes"))
    except answers.Refused as refused:
        return _refusal(_status(refused.problem), refused.problem, refused.head_document)
    except MotteError as problem:
        return _refusal(_status(problem), problem)


async def _body(request: Request) -> bytes:
    parts, count = [], 0
    async for each in request.stream():
        count += len(each)
        if count > MAX_BROKER_REQUEST_BYTES:
            raise _TooLarge
        parts.append(each)
    return b"".join(parts)


def _status(problem: MotteError) -> int:
    if isinstance(problem, FormatError | InputError):
        return 400
    if isinstance(problem, TrustError):
        return 403
    if isinstance(problem, ResourceError) and "nonces" in problem.message:
        return 429
    _LOG.warning("the broker could not answer: %s", problem)
    return 503


def _refusal(status: int, problem: MotteError, head: dict[str, Any] | None = None) -> Response:
    error = {"kind": type(problem).__name__, "message": problem.message}
    error |= {name: value for name in _FACTS if (value := getattr(problem, name)) is not None}
    return _json(status, canonical({"error": error} if head is None else {"error": error, "head": head}))


def _json(status: int, data: bytes) -> Response:
    return Response(data, status_code=status, media_type="application/json", headers={"Cache-Control": "no-store"})


def _add_gets(app: FastAPI, broker: Broker) -> None:
    @app.get("/v1/broker", summary="What to seal bundles to, and the newest head; signed.", operation_id="Identity")
    def identity() -> Response:
        with broker.store.read() as db:
            head = log.newest_head(db)
        body = {
            "format": IDENTITY_FORMAT,
            "head": head,
            "recipient": str(broker.recipient.public),
            "time": int(time.time()),
        }
        return _json(200, canonical(sign(body, broker.signer)))

    @app.get("/v1/audit/head", summary="The newest signed head of the audit log.", operation_id="Head")
    def head() -> Response:
        with broker.store.read() as db:
            return _json(200, canonical(log.newest_head(db)))

    @app.get("/v1/audit/digests", summary="Digests of entries after one, until another.", operation_id="Digests")
    def digests(
        after: Annotated[int, Query(ge=0, le=MAX_RELEASE)], until: Annotated[int, Query(ge=0, le=MAX_RELEASE)]
    ) -> Response:
        with broker.store.read() as db:
            found = log.digests(db, after, min(until, after + MAX_AUDIT_PAGE))
        return _json(200, canonical({"digests": [each.hex() for each in found]}))


def _add_schema(app: FastAPI) -> None:
    made = app.openapi()
    made.setdefault("components", {}).setdefault("schemas", {}).update(_BODIES)
    app.openapi = lambda: made  # type: ignore[method-assign]
    rows = "".join(
        f"<tr><td>{method.upper()}</td><td><code>{html.escape(path)}</code></td><td>{html.escape(door['summary'])}</td></tr>"
        for path, doors in made["paths"].items()
        for method, door in doors.items()
    )
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>motte key broker</title>"
        f"<h1>{html.escape(app.title)}</h1><p>{html.escape(app.description)}</p><table>{rows}</table>"
        "<p>All of it for programs: <a href=/openapi.json>openapi.json</a>.</p></html>"
    )

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(page)
