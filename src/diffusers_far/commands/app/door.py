"""What reaches the page: calls from the hosts that it is served as, not too many at once, and uploads within bounds.

Gradio has one line for all calls, and writes uploads to the disk before anyone asks who sent them; so this stands before it.
"""

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from starlette.formparsers import MultiPartException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .settings import WorldLimits, checked_hosts
from .visitors import VisitorStore


API = "/gradio_api"  # Gradio's prefix
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
MAX_CALL_BYTES = 2**16
FORM_BYTES = 2**16  # that a form has around its files


def guards(
    visitors: VisitorStore, limits: WorldLimits, folder: Path, allowed_hosts: Iterable[str] = ()
) -> list[Middleware]:
    """What stands before Gradio, outermost first.

    Args:
        visitors ([`VisitorStore`]), limits ([`WorldLimits`]).
        folder (`Path`): Where Gradio keeps uploads and copies of downloads.
        allowed_hosts (iterable of `str`): Names in the `Host` header that are taken beside those of this machine, see
            [`checked_hosts`].
    """
    hosts = [*LOCAL_HOSTS, *checked_hosts(allowed_hosts)]
    return [
        Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
        Middleware(Door, visitors=visitors, limits=limits, folder=folder),
    ]


def hosts_of_a_space(space_host: str | None) -> list[str]:
    """The name that a Space is served under, and its machine's own address, by which its health is asked for."""
    own = socket.gethostname()
    try:
        addresses = {str(found[4][0]).partition("%")[0] for found in socket.getaddrinfo(own, None)}
    except OSError:
        addresses = set()
    in_headers = (f"[{address}]" if ":" in address else address for address in sorted(addresses))
    return [host for host in (space_host, own, *in_headers) if host]


class Door:
    """ASGI middleware: of what a page may send there are presses, uploads and the word that it leaves; nothing else is let
    in, and of these no more than the limits say.

    Args:
        app (ASGI application): Gradio's.
        visitors, limits, folder: See [`guards`].
        clock (callable): Seconds; for tests.
    """

    def __init__(
        self,
        app: ASGIApp,
        visitors: VisitorStore,
        limits: WorldLimits,
        folder: Path,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.app = app
        self.visitors = visitors
        self.limits = limits
        self.folder = folder
        self.clock = clock
        self._num_uploads = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").rstrip("/")  # a lifespan has none
        reads = scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS")
        if reads and path != f"{API}/deep_link":  # which writes a file
            await self.app(scope, receive, send)
        elif path == f"{API}/queue/join":
            await self._press(scope, receive, send)
        elif path == f"{API}/upload":
            await self._upload(scope, receive, send)
        elif path in (f"{API}/cancel", f"{API}/reset"):
            await self.app(scope, receive, send)
        else:
            await refuse(404, "The page has no such call.", scope, receive, send)

    async def _press(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A call of a handler: small, of a session, about no other files than uploads, and not one of a flood."""
        body, is_whole = b"", False
        while not is_whole:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            is_whole = not message.get("more_body", False)
            if len(body) > MAX_CALL_BYTES:
                return await refuse(413, f"A call has {MAX_CALL_BYTES} bytes at most.", scope, receive, send)
        try:
            session = json.loads(body, object_hook=self._with_uploads_alone)["session_hash"]
        except (ValueError, KeyError, TypeError, RecursionError):
            session = None
        if not isinstance(session, str) or not 0 < len(session) <= 64:
            why = "A call needs the `session_hash` of its page, and names files as their upload was answered."
            return await refuse(400, why, scope, receive, send)
        if not self.visitors.admits(session):
            return await refuse(429, "Too many calls in one second; wait a moment.", scope, receive, send)
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> dict:
            return messages.pop() if messages else await receive()

        await self.app(scope, receive_again, send)

    def _with_uploads_alone(self, part: dict) -> dict:
        """Gradio would download a file whose path is an address, whatever its size."""
        if not str(part.get("path") or self.folder).startswith(str(self.folder)):
            raise ValueError("This is no upload.")
        return part

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Files: a few at once, no larger than one clip may be, not slower than they may be; the oldest make room.

        Whatever breaks an upload off is told to Gradio as a fault of the form: for such it removes what it has written.
        """
        limits = self.limits
        if self._num_uploads >= limits.max_uploads_at_once:
            return await refuse(503, "Others are uploading; try again in a moment.", scope, receive, send)
        end, num_bytes = self.clock() + limits.upload_seconds, 0

        async def receive_within_limits() -> dict:
            nonlocal num_bytes
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - self.clock()))
            except TimeoutError:
                raise MultiPartException(f"An upload may take {limits.upload_seconds:g} seconds.") from None
            if message["type"] == "http.disconnect":
                raise MultiPartException("The upload was broken off.")
            num_bytes += len(message.get("body", b""))
            if num_bytes > limits.upload.max_bytes + FORM_BYTES:
                raise MultiPartException(f"File exceeds the maximum allowed size of {limits.upload.max_bytes} bytes.")
            return message

        self._num_uploads += 1
        try:
            await self.app(scope, receive_within_limits, send)
        finally:
            self._num_uploads -= 1
            await asyncio.to_thread(keep_within, self.folder, limits.max_files, limits.max_file_bytes)


async def refuse(status: int, why: str, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse({"detail": why}, status)(scope, receive, send)


def keep_within(folder: Path, max_files: int, max_bytes: int) -> None:
    """Remove the oldest files of a folder and those below it until no more are left than there may be, and folders that this
    empties. Files and folders that others remove meanwhile are passed over."""
    files = []
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            with suppress(OSError):
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    num_bytes = sum(size for _, size, _ in files)
    for place, (_, size, path) in enumerate(sorted(files)):
        if len(files) - place <= max_files and num_bytes <= max_bytes:
            break
        path.unlink(missing_ok=True)
        num_bytes -= size
        if path.parent != folder:
            with suppress(OSError):  # not empty, or removed meanwhile
                path.parent.rmdir()
