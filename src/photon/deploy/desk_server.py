"""HTTP for the desk: sockets that only this machine reaches, bounded requests, errors as JSON.

What is asked, and of whom, is in photon.deploy.desk; nothing in here knows members or tasks.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import resource
import socket
import sqlite3
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from photon.deploy.desk_requests import caller_address
from photon.errors import (
    AccessRefusedError,
    ClockSkewError,
    DeployError,
    KeyInUseError,
    MembershipError,
    PhotonError,
    PortInUseError,
    ProtocolError,
    SignatureError,
    UnreachableError,
)
from photon.membership.desk_documents import Failure, error_record
from photon.membership.records import printable

logger = logging.getLogger("photon.desk")

#: By class, the nearest base counts; others are the desk's own trouble: 503.
_STATUS: dict[type[PhotonError], int] = {
    ProtocolError: 400,
    SignatureError: 401,
    ClockSkewError: 401,
    MembershipError: 403,
    AccessRefusedError: 403,
    KeyInUseError: 409,
}

#: Longer than the front door keeps a connection that nobody uses (2 minutes): it never sends a
#: request into one that the desk is just closing.
_KEEP_ALIVE_S = 150

#: Request line and headers together.
_HEADER_BYTES = 16 << 10

#: Of a body that is too long, so much is read before it is refused.
_READ_AND_FORGOTTEN_BYTES = 4 << 20

#: Of Python's threads, in this process: they do little between two waits.
_SWITCH_S = 0.0005

_START_S = 20.0
_STOP_S = 10.0
_OPERATOR_S = 20.0


@dataclass
class Caller:
    """One request.

    Attributes:
        path: what is asked for; signed.
        headers: lower-case names.
        address: whom to count it against (`caller_address`).
        body: as it arrived.
        whole: whether the body was read to its end.
        name: the member's, once that is proved.
    """

    path: str
    headers: Mapping[str, str]
    address: str
    body: bytes = b""
    whole: bool = False
    name: str = ""


class RefusedError(Exception):
    """An answer that needs a status of its own, and that may be too frequent to be noted."""

    def __init__(self, status: int, error: PhotonError, *, noted: bool = True) -> None:
        super().__init__(status)
        self.status = status
        self.error = error
        self.noted = noted


#: Answers a request, in a thread or (a coroutine) in the event loop; what it raises becomes an
#: answer too.
Handler = (
    Callable[[Caller], dict[str, Any]] | Callable[[Caller], Coroutine[Any, Any, dict[str, Any]]]
)

#: Told of every refusal that is to be noted.
Noter = Callable[[Caller, PhotonError], None]


class Routes:
    """An application of a few paths, each for one method and bodies of a bounded size.

    Args:
        note: told of refusals.
        body_s: for a request's body to arrive.
    """

    def __init__(self, note: Noter, *, body_s: float) -> None:
        self._note = note
        self._body_s = body_s
        self._routes: list[Route] = []

    def add(self, method: str, path: str, handle: Handler, most_bytes: int) -> None:
        """Answer one kind of request.

        Args:
            most_bytes: of its body.
        """

        async def endpoint(request: Request) -> Response:
            address = caller_address(
                request.client.host if request.client else None,
                request.headers.get("x-forwarded-for"),
            )
            caller = Caller(path, dict(request.headers), address)
            try:
                await self._read(request, caller, most_bytes)
                if request.url.query:
                    raise ProtocolError(f"{path} takes no query")
                if inspect.iscoroutinefunction(handle):
                    return JSONResponse(await _unless_gone(request, handle(caller)))
                return JSONResponse(await run_in_threadpool(handle, caller))
            except ClientDisconnect:
                return Response(status_code=400)  # to nobody
            except Exception as error:
                return await run_in_threadpool(self._refuse, caller, error)

        self._routes.append(Route(path, endpoint, methods=[method]))

    def application(self) -> Starlette:
        """What uvicorn runs."""

        async def lost(request: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            what = f"{printable(request.method)[:20]} {printable(request.url.path)[:100]}"
            told = ProtocolError(f"{what} is not asked here")
            caller = Caller("", {}, "")
            with contextlib.suppress(RefusedError, ClientDisconnect):
                await self._read(request, caller, 0)
            return _refusal(error.status_code, told, close=not caller.whole)

        app = Starlette(routes=list(self._routes), exception_handlers={HTTPException: lost})
        app.router.redirect_slashes = False
        return app

    async def _read(self, request: Request, caller: Caller, most_bytes: int) -> None:
        """Read the body into `caller`.

        Also one that is a little too long is read: who writes to a closed connection often doesn't
        get to read why. One that is announced as longer is refused before it is read.
        """
        pieces: list[bytes] = []
        announced = request.headers.get("content-length", "")
        if announced[:20].isdecimal() and int(announced[:20]) > _READ_AND_FORGOTTEN_BYTES:
            raise _too_long(int(announced[:20]), most_bytes)
        size = 0
        try:
            async with asyncio.timeout(self._body_s):
                async for piece in request.stream():
                    size += len(piece)
                    if size <= most_bytes:
                        pieces.append(piece)
                    elif size > _READ_AND_FORGOTTEN_BYTES:
                        break
                else:
                    caller.whole = True
        except TimeoutError:
            raise RefusedError(
                408, ProtocolError(f"no whole request arrived within {self._body_s:g} s")
            ) from None
        if size > most_bytes:
            raise _too_long(size, most_bytes)
        caller.body = b"".join(pieces)

    def _refuse(self, caller: Caller, error: Exception) -> Response:
        """The answer for an error."""
        noted = True
        if isinstance(error, RefusedError):
            status, told, noted = error.status, error.error, error.noted
        elif isinstance(error, PhotonError) and not isinstance(error.__cause__, sqlite3.Error):
            kinds = type(error).__mro__
            status = next((_STATUS[kind] for kind in kinds if kind in _STATUS), 503)
            told = error
        else:
            # Nothing that a caller sends should get here: the machine is in trouble (a roster that
            # can't be written), or the desk has a fault.
            logger.error("%s: %s", caller.path, type(error).__name__, exc_info=error)
            status = 503 if isinstance(error, PhotonError) else 500
            told = DeployError("the desk can't answer just now; its log says why")
        if noted:
            self._note(caller, told)
        return _refusal(status, told, close=not caller.whole)


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, dict[str, Any]]) -> Any:
    """An answer that may be long in coming; given up when nobody waits for it any more.

    Raises:
        ClientDisconnect: the caller's connection was cut.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientDisconnect
        return await answering
    finally:
        answering.cancel()
        leaving.cancel()


def _too_long(size: int, most_bytes: int) -> RefusedError:
    words = f"a request of {size} bytes or more; {most_bytes} are allowed"
    return RefusedError(413, ProtocolError(words))


def _refusal(status: int, error: PhotonError, *, close: bool) -> JSONResponse:
    """An error as an answer.

    Args:
        close: the connection: what is left of the request would be read, and be it without end.
    """
    headers = {"connection": "close"} if close else {}
    if status in (429, 503):
        headers["retry-after"] = "10"
    return JSONResponse({"error": error_record(error)}, status, headers)


class ServerThread:
    """Serves applications, each on a listening socket of its own, in one thread.

    Args:
        served: application and socket; the sockets are closed at the end.
    """

    def __init__(self, served: Sequence[tuple[Starlette, socket.socket]]) -> None:
        self._listeners = [listener for _, listener in served]
        self._servers = [
            uvicorn.Server(
                uvicorn.Config(
                    app,
                    loop="asyncio",
                    http="h11",
                    ws="none",
                    lifespan="off",
                    # What there is to say goes to the roster and to `on_event`; URLs go nowhere.
                    log_config=None,
                    access_log=False,
                    proxy_headers=False,
                    server_header=False,
                    timeout_keep_alive=_KEEP_ALIVE_S,
                    timeout_graceful_shutdown=3,
                    h11_max_incomplete_event_size=_HEADER_BYTES,
                )
            )
            for app, _ in served
        ]
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="photon-desk", daemon=True)

    def allow(self, most_connections: int) -> None:
        """So many at once, for each application, from the next connection on."""
        for server in self._servers:
            server.config.limit_concurrency = most_connections
        files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files < (wanted := min(most, 2 * most_connections)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))

    def start(self) -> None:
        """When this returns, requests are answered.

        Raises:
            DeployError: they are not.
        """
        self._thread.start()
        deadline = time.monotonic() + _START_S
        while not all(server.started for server in self._servers):
            if self._failure is not None or time.monotonic() > deadline:
                self.stop()
                raise DeployError(f"the desk does not start: {self._failure or 'no answer'}")
            time.sleep(0.01)

    def stop(self) -> None:
        """Answer what was asked, then listen no more.

        Raises:
            DeployError: it takes longer than it may.
        """
        for server in self._servers:
            server.should_exit = True
        self._thread.join(timeout=_STOP_S)
        if self._thread.is_alive():
            raise DeployError(f"the desk did not stop within {_STOP_S:g} s")

    @property
    def alive(self) -> bool:
        """Whether it still serves: a supervisor asks."""
        return self._thread.is_alive() and self._failure is None

    def _run(self) -> None:
        async def serve() -> None:
            await asyncio.gather(
                *(
                    server.serve(sockets=[listener])
                    for server, listener in zip(self._servers, self._listeners, strict=True)
                )
            )

        try:
            # A thread that comes back from SQLite waits for so long, where the event loop is busy:
            # with Python's own 5 ms a thousand nodes waited half a minute for one another.
            sys.setswitchinterval(_SWITCH_S)
            asyncio.run(serve())
        except BaseException as error:
            self._failure = error
            logger.exception("the desk ended")
        finally:
            for listener in self._listeners:
                listener.close()


# --- sockets --------------------------------------------------------------------------------------


def loopback_socket(port: int) -> socket.socket:
    """Listens on 127.0.0.1; on any free port if 0.

    Raises:
        PortInUseError: somebody else does.
    """
    # asyncio switches Nagle's delay off only for sockets that say that they are TCP: without it
    # every answer comes 40 ms later.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        # Two may bind so; only one may listen.
        listener.listen(4096)
    except (OSError, OverflowError) as error:
        listener.close()
        raise PortInUseError(
            f"the desk can't listen on 127.0.0.1:{port}: {error}",
            hint="Another `photon serve`, or another service, has it: end that, or free the port.",
        ) from error
    return listener


def private_socket(path: Path) -> socket.socket:
    """Listens on a unix socket that only this user can open. A dead one is replaced.

    Raises:
        PortInUseError: somebody answers there.
        DeployError: it can't be made.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if _answers(path):
            raise PortInUseError(
                f"somebody answers on {path}",
                hint="Another `photon serve` runs from this folder; `photon stop` ends it.",
            )
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise DeployError(f"{path} is there and is no socket", hint="Move it away.")
            path.unlink()
        # In the moment between bind and chmod others might open it: it is made in a folder that
        # only this user can enter.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".s") as folder:
            made = Path(folder) / "s"
            listener.bind(str(made))
            made.chmod(0o600)
            listener.listen(64)
            made.rename(path)
    except OSError as error:
        listener.close()
        raise DeployError(
            f"can't make the operator's socket {path}: {error}",
            hint="Paths of unix sockets have at most 107 characters: use a shorter serve.home."
            if len(os.fsencode(path)) > 90
            else None,
        ) from error
    except BaseException:
        listener.close()
        raise
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


# --- the other end of the operator's socket -------------------------------------------------------


def ask_operator(
    path: Path, method: str, what: str, body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Ask a serve that runs on this machine: `photon status`, `photon stop`.

    Args:
        path: of its operator's socket.
        method, what: "GET", "/operator/status"; "POST", "/operator/drain" or "/operator/stop".

    Raises:
        UnreachableError: nobody answers.
        PhotonError: what the desk says is wrong.
    """
    transport = httpx2.HTTPTransport(uds=str(path))
    try:
        if not _answers(path):  # httpx leaves a socket open that did not connect
            raise httpx2.ConnectError("nobody listens")
        with httpx2.Client(transport=transport, timeout=_OPERATOR_S) as client:
            document = client.request(method, f"http://desk{what}", json=body).json()
    except (httpx2.HTTPError, ValueError) as error:
        raise UnreachableError(
            f"no `photon serve` answers on {path}: {error}",
            hint="Is it running, on this machine, as this user, with this home?",
        ) from error
    if "error" in document:
        raise Failure.model_validate(document).error.raised()
    return document
