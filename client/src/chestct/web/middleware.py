"""ASGI middleware: host and origin checks, authentication, rate limit, security headers."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from chestct.web.settings import WebSettings

__all__ = ["SECURITY_HEADERS", "Guard", "error_body"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

STALL_TIMEOUT_S = 60.0  # a browser that reads no more does not hold a decoder for ever
MAX_KNOWN_USERS = 10_000
OPEN_PATHS = ("/", "/healthz")  # the empty page and whether the service works are no secret

# No inline script or style, nothing from elsewhere, no form, no frame. Trusted Types leaves a
# script that tries to write markup without effect.
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def error_body(kind: str, message: str) -> dict[str, Any]:
    """What every refusal answers: `error` with `type` and `message`."""
    return {"error": {"type": kind, "message": message}}


class Guard:
    """Checks Host, origin, token or proxy, and rate; adds the headers; ends stalled answers."""

    def __init__(self, app: App, settings: WebSettings) -> None:
        self._app = app
        self._settings = settings
        self._rate = _Rate(settings.requests_a_minute / 60, settings.burst)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request, or passes it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                have = {name.lower() for name, _ in message["headers"]}
                added = {**SECURITY_HEADERS, "cache-control": "no-store"}
                message["headers"] = [
                    *message["headers"],
                    *(
                        (name.encode(), value.encode())
                        for name, value in added.items()
                        if name.encode() not in have
                    ),
                ]
            async with asyncio.timeout(STALL_TIMEOUT_S):
                await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is None:
            await self._app(scope, receive, send_guarded)
        else:
            await _refuse(send_guarded, *refusal)

    def _refusal(
        self, scope: Message, headers: dict[str, bytes]
    ) -> tuple[int, str, str, dict[str, str]] | None:
        """Status, kind, message and headers of what is refused."""
        settings, path = self._settings, scope["path"]
        host = headers.get("host", b"").decode("latin-1")
        if _without_port(host).lower() not in settings.hosts:
            return (
                421, "HostError",
                f"this server is not called {host[:100]!r}. Use one of {', '.join(settings.hosts)},"
                " or start it with --allow-host NAME.", {},
            )  # fmt: skip
        is_foreign = headers.get("sec-fetch-site", b"same-origin") in (b"cross-site", b"same-site")
        origin = headers.get("origin")
        if origin is not None:
            is_foreign |= origin.decode("latin-1").partition("://")[2] != host
        if is_foreign and scope["method"] not in ("GET", "HEAD"):
            return 403, "OriginError", "another site may not send scans to this one", {}
        peer = scope["client"][0] if scope.get("client") else ""
        user = peer
        if path in OPEN_PATHS or path.startswith("/static/"):
            return None
        if settings.user_header:
            name = headers.get(settings.user_header.lower(), b"").decode("latin-1")
            if not name or peer not in settings.proxies:
                return 401, "AuthorizationError", "this page is reached through its proxy only", {}
            user = name
        if settings.token:
            given = headers.get("authorization", b"")
            scheme, _, token = given.partition(b" ")
            right = hmac.compare_digest(token.strip(), settings.token.encode())
            if scheme.lower() != b"bearer" or not right:
                if not self._rate.take(user):
                    return self._too_fast(user)
                return (
                    401, "AuthorizationError", "expected Authorization: Bearer TOKEN",
                    {"www-authenticate": "Bearer"},
                )  # fmt: skip
        if path == "/api/classify" and scope["method"] == "POST" and not self._rate.take(user):
            return self._too_fast(user)
        return None

    def _too_fast(self, user: str) -> tuple[int, str, str, dict[str, str]]:
        wait_s = self._rate.wait_s(user)
        message = f"more than {self._settings.requests_a_minute} uploads a minute; wait {wait_s} s"
        return 429, "RateError", message, {"retry-after": str(wait_s)}


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


async def _refuse(
    send: Send, status: int, kind: str, message: str, headers: dict[str, str]
) -> None:
    body = json.dumps(error_body(kind, message)).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    pairs = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


class _Rate:
    """A bucket of tokens for each user; the users asked longest ago are forgotten first."""

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s, self._burst = per_s, burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, user: str) -> bool:
        now = time.monotonic()
        tokens, then = self._buckets.pop(user, (float(self._burst), now))
        tokens = min(tokens + (now - then) * self._per_s, self._burst)
        is_free = tokens >= 1
        self._buckets[user] = (tokens - is_free, now)
        if len(self._buckets) > MAX_KNOWN_USERS:
            self._buckets.popitem(last=False)
        return is_free

    def wait_s(self, user: str) -> int:
        tokens, _ = self._buckets[user]
        return max(1, int((1 - tokens) / self._per_s + 0.999))
