"""Who may ask: pages of this server, under its own name, and nobody else's page in the same browser.

The server has no passwords: whoever can connect may ask. It listens on 127.0.0.1 unless told otherwise, and browsers
are kept from letting other sites in:

1. The Host header must be a name of this server, so that a site whose name is made to point here (DNS rebinding) gets
   nothing.
2. What the API answers is asked by our own pages alone, by any method: another site could not read an answer, and may
   not make us compute one either. What is sent must be application/json, which another site's form cannot send without
   being asked first.
3. Pages may load nothing from elsewhere and run no script but ours, so that text of a token stays text.
"""

import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from topkapi.console import say
from topkapi.viewer.answers import Answer

POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data: blob:",
    "connect-src": "'self'",
    "font-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
API = "/api/"


class Names:
    """The names under which a server that listens on `host` may be asked."""

    def __init__(self, host: str) -> None:
        self.names = {"localhost", "127.0.0.1", "::1", host.lower()}
        self.any_address = _is_address(host) and ipaddress.ip_address(host).is_unspecified
        if self.any_address:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    def __contains__(self, host: str) -> bool:
        """Whether a Host header names this server; its port may be another one, that of a tunnel."""
        try:
            name, _port = (parts := urlsplit(f"//{host}")).hostname, parts.port
        except ValueError:
            return False
        if not name or parts.netloc != host or "@" in host:
            return False
        return name in self.names or (self.any_address and _is_address(name))


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


class Guard:
    """Middleware: refuses strangers, adds the headers to every answer, and answers with JSON where a route failed."""

    def __init__(self, app: ASGIApp, names: Names) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if problem := self._problem(scope["path"], Headers(scope=scope)):
            await Answer({"error": problem}, 403)(scope, receive, guarded)
            return
        try:
            await self.app(scope, receive, guarded)
        except Exception as error:
            say(f"warning: {scope['method']} {scope['path'][:200]!r} failed: {type(error).__name__}: {error}")
            if started:
                raise
            await Answer({"error": "this failed; the terminal of topkapi view says how."}, 500)(scope, receive, guarded)

    def _problem(self, path: str, headers: Headers) -> str | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0] not in self.names:
            known = ", ".join(sorted(self.names.names))
            return f"this server is not called so; its names are {known}. Name others with --host."
        if not path.startswith(API):
            return None
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return "only the viewer's own pages may ask for this."
        return next((_foreign(origin) for origin in headers.getlist("origin") if not _same(origin, hosts[0])), None)


def _same(origin: str, host: str) -> bool:
    return origin.lower() in {f"{scheme}://{host.lower()}" for scheme in ("http", "https")}


def _foreign(origin: str) -> str:
    return f"only the viewer's own pages may ask for this, not {origin[:100]!r}."
