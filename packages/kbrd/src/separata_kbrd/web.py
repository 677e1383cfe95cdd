"""A page to talk with the system in a browser: the verb ``web``.

Everything the page needs comes from this program; it asks no other address for anything.
"""

import json
import secrets
import socket
import threading
from collections import OrderedDict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .conversation import Conversation, Turn
from .explain import Explainer, draw, node_names
from .system import System, load_system

if TYPE_CHECKING:
    from starlette.applications import Starlette

MOST_BYTES = 200_000
"""Largest request; a message of 10,000 characters fits whatever its script."""
MOST_VISITORS = 200
"""Conversations that are kept; the one unused for longest makes room."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


class Visitors:
    """The conversations of a page, one for each visitor.

    Args:
        system: Answers.
    """

    def __init__(self, system: System) -> None:
        self._system = system
        self._names = node_names(system)
        self._explainer = Explainer(system.recommender.corpus.graph)
        self._conversations: OrderedDict[str, Conversation] = OrderedDict()
        self._pictures: dict[str, bytes] = {}
        self._lock = threading.Lock()  # one answer at a time; a model has no use for more

    def begin(self) -> str:
        """Open a conversation and give its secret name."""
        with self._lock:
            visitor = secrets.token_urlsafe(16)
            self._conversations[visitor] = Conversation(self._system)
            while len(self._conversations) > MOST_VISITORS:
                oldest, _ = self._conversations.popitem(last=False)
                self._pictures.pop(oldest, None)
            return visitor

    def say(self, visitor: str, text: str) -> dict[str, Any] | None:
        """Answer a message; None if there is no such conversation."""
        with self._lock:
            conversation = self._conversations.get(visitor)
            if conversation is None:
                return None
            self._conversations.move_to_end(visitor)
            turn = conversation.say(text)
            self._pictures.pop(visitor, None)
            if turn.reply is not None and turn.reply.attention:
                shown = turn.reply.items or turn.reply.suggestions[:3]
                reason = self._explainer.reason(turn.reply.attention, shown)
                self._pictures[visitor] = draw(reason, self._names)
            return self._as_json(turn, has_picture=visitor in self._pictures)

    def picture(self, visitor: str) -> bytes | None:
        """The picture of the last answer."""
        return self._pictures.get(visitor)

    def _as_json(self, turn: Turn, *, has_picture: bool) -> dict[str, Any]:
        reply = turn.reply
        suggestions = [] if reply is None else [self._names[n] for n in reply.suggestions]
        attention = [] if reply is None else reply.attention
        return {
            "text": turn.text,
            "choices": turn.choices,
            "notes": turn.notes,
            "heard": turn.heard,
            "suggestions": suggestions,
            "attention": [[self._names[node], round(weight, 4)] for node, weight in attention],
            "picture": has_picture,
        }


def build_app(system: System, *, hosts: list[str]) -> "Starlette":
    """The page as an ASGI application.

    Args:
        system: Answers.
        hosts: Names under which the page may be asked for, so that no foreign page can use it.

    Raises:
        ValueError: The library of the extra ``web`` is missing.
    """
    try:
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.requests import Request
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route
    except ImportError:
        raise ValueError("the page needs: pip install 'separata-kbrd[web]'") from None
    visitors = Visitors(system)

    def refuse(status: int, reason: str) -> Response:
        return JSONResponse({"error": reason}, status_code=status, headers=HEADERS)

    async def file(request: Request) -> Response:
        name, kind = FILES[request.url.path]
        content = resources.files(__package__).joinpath("page", name).read_bytes()
        return Response(content, media_type=kind, headers=HEADERS)

    async def begin(request: Request) -> Response:
        return JSONResponse({"visitor": visitors.begin()}, headers=HEADERS)

    async def say(request: Request) -> Response:
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > MOST_BYTES:
                return refuse(413, "the message is too long")
        message = read_message(body)
        if message is None:
            return refuse(400, "a message is JSON with the texts visitor and text")
        answer = await run_in_threadpool(visitors.say, *message)
        if answer is None:
            return refuse(404, "no such conversation; reload the page")
        return JSONResponse(answer, headers=HEADERS)

    async def picture(request: Request) -> Response:
        found = visitors.picture(request.path_params["visitor"])
        if found is None:
            return refuse(404, "no picture")
        return Response(found, media_type="image/png", headers=HEADERS)

    return Starlette(
        routes=[
            *(Route(path, file) for path in FILES),
            Route("/begin", begin, methods=["POST"]),
            Route("/say", say, methods=["POST"]),
            Route("/picture/{visitor}.png", picture),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
    )


def read_message(body: bytes) -> tuple[str, str] | None:
    """Visitor and text of a request; None if it is not such a request."""
    try:
        message = json.loads(body)
        visitor, text = message["visitor"], message["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (visitor, text) if isinstance(visitor, str) and isinstance(text, str) else None


def web(
    *,
    run: Path = Path("runs/tiny"),
    host: str = "127.0.0.1",
    port: int = 7860,
    beam: int | None = None,
) -> None:
    """Serve a page to talk with the system, until Ctrl-C.

    Args:
        run: Run directory.
        host: Address to listen at; by default only this machine can connect.
        port: Port to listen at; 0 takes a free one.
        beam: Hypotheses kept for each answer; default: the run's.

    Raises:
        ValueError: The run cannot be read, the port is no port, or the extra ``web`` is missing.
        OSError: The address cannot be listened at.
    """
    if not 0 <= port < 65536:
        raise ValueError(f"port: must lie between 0 and 65535, is {port}")
    try:
        import uvicorn
    except ImportError:
        raise ValueError("the page needs: pip install 'separata-kbrd[web]'") from None
    hosts = ["*"] if host in ("0.0.0.0", "::") else [host, "localhost", "127.0.0.1", "[::1]"]
    app = build_app(load_system(run, beam=beam), hosts=hosts)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:
        print(f"http://{host}:{listening.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
