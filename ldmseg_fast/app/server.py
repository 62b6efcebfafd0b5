"""Serves the page, the API, /health and /metrics in one process: FastAPI with gradio in it, run by uvicorn."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import logging
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmseg_fast import __version__
from ldmseg_fast.app.limits import Limits
from ldmseg_fast.app.metrics import PrometheusMetrics
from ldmseg_fast.app.work import Segmented, Worker
from ldmseg_fast.checkpoints.hub_names import shown_name
from ldmseg_fast.errors import ArgumentError, BackendError

SESSIONS = 500  # visitors whose settings and results are held in memory; of more, the oldest are dropped
LEAVE = 3  # seconds that open connections have when the server ends
LOCAL = ("127.0.0.1", "::1", "localhost")
MISSING = "gradio is not installed, which the app needs: pip install 'ldmseg_fast[app]'"


@dataclass(frozen=True)
class Address:
    """Says where the server listens and what it asks for.

    Attributes:
        host, port: port 0 takes a free one.
        auth: "USER:PASSWORD" or None.
        share: whether gradio's tunnel makes it public.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    auth: str | None = None
    share: bool = False


def require_gradio() -> None:
    """Checks that the packages of the extra [app] are there.

    Raises:
        BackendError: says how to install them.
    """
    try:
        import fastapi  # noqa: F401
        import gradio  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("fastapi", "gradio", "prometheus_client", "uvicorn"):
            raise
        raise BackendError(MISSING) from None


def listen(host: str, port: int) -> socket.socket:
    """Takes a port.

    Raises:
        ArgumentError: it is in use, and which one is free; or no such host, or a port that needs more rights.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ArgumentError(f"--host {host}: no such address here ({error})") from None
    found = socket.socket(family, kind, proto)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except OSError as error:
        found.close()
        free = _free_port(family, kind, address)
        hint = f": --port {free} is free" if free else ""
        raise ArgumentError(f"--port {port} on {host}: {error.strerror or error}{hint}") from None
    return found


def _free_port(family: int, kind: int, address: tuple[Any, ...]) -> int:
    for port in (*range(address[1] + 1, min(address[1] + 50, 65536)), 0):
        with socket.socket(family, kind) as probe:
            try:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((address[0], port, *address[2:]))
            except OSError:
                continue
            return probe.getsockname()[1]
    return 0


def only_local(bound: socket.socket, address: Address) -> bool:
    """Tells whether a server is for programs of this machine only: no network, no tunnel and no password."""
    inside = ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback
    return inside and not address.share and address.auth is None


def make_app(
    worker: Worker,
    limits: Limits,
    folder: Path,
    auth: str | None,
    build: Callable[..., Any],
    local: bool = False,
) -> Any:
    """Makes the ASGI app: the page at /, the API below /gradio_api, /health and /metrics.

    Args:
        worker, limits: of all visitors.
        folder: of `visitors_folder`.
        auth: as in `Address`.
        build: (worker, limits) -> the page, a `gr.Blocks`; where its module has `look()`, that gives its style.
        local: of `only_local`.
    """
    import fastapi
    import gradio as gr
    from fastapi.responses import PlainTextResponse

    from ldmseg_fast.app import api
    from ldmseg_fast.app.gate import Gate

    started = time.time()
    page = build(worker, limits)
    worker.keep = _counting(worker.keep, limits)
    for function in page.fns.values():
        function.api_name = f"page-{function._id}"  # or the API's own names would be taken
    with page:
        api.add(worker, limits)
    page.queue(max_size=limits.queue, default_concurrency_limit=1, api_open=False)
    if isinstance(limits.metrics, PrometheusMetrics):
        limits.metrics.observe_queue(lambda: len(page._queue))
    outer = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @outer.get("/health")
    def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "version": __version__,
            "model": shown_name(worker.info.folder),
            "backends": list(worker.backends),
            "seconds": round(time.time() - started, 1),
            "running": limits.running(),
            "waiting": len(page._queue),
        }

    @outer.get("/metrics")
    def metrics() -> PlainTextResponse:
        text = limits.metrics.text() if isinstance(limits.metrics, PrometheusMetrics) else b""
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    look: dict[str, Any] = getattr(sys.modules.get(build.__module__), "look", dict)()
    gr.mount_gradio_app(
        outer,
        page,
        path="/",
        show_error=True,
        max_file_size=limits.max_upload,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        **{"footer_links": [], "run_history": False, **look},
    )
    page.state_session_capacity = page.state_holder.capacity = SESSIONS

    def forget(event: str) -> None:
        """Drops what gradio holds of a request of the API, for whose like it would keep a page's session."""
        with page.state_holder.lock:
            page.state_holder.session_data.pop(event, None)
            page.state_holder.time_last_used.pop(event, None)
        page._queue.pending_event_ids_session.pop(event, None)

    page.has_launched = True  # or gradio takes any file of this machine for an upload
    return Gate(outer, limits, folder, auth, forget, check=functools.partial(_wrong_call, page), local=local)


def _wrong_call(page: Any, path: str, body: Any) -> str | None:
    """Says what is wrong with a call that gradio would answer with a traceback in the log; None where nothing is."""
    if not isinstance(body, dict):
        return None
    found = re.fullmatch(r"/gradio_api/call/([^/]+)/?", path)
    call = found and found[1]
    number, data = body.get("fn_index"), body.get("data")
    if call is None and path.startswith("/gradio_api/") and isinstance(number, int) and number not in page.fns:
        return f"fn_index={number!r:.40}: this app has no such function: load the page again"
    if not isinstance(data, list):
        return None
    for function in page.fns.values():
        expected = len(function.inputs)
        if call is not None and function.api_name == call and len(data) != expected:
            return f"{call}: `data` has {len(data)} values; {expected} expected, see docs/app.md"
        if call is None and function._id == number and len(data) < expected:
            return f"fn_index={number}: `data` has {len(data)} values; {expected} expected"
    return None


def _counting(keep: Callable[..., None] | None, limits: Limits) -> Callable[..., None]:
    def count(work: str, picture: Any, done: Segmented) -> None:
        limits.metrics.segments(len(done.result.segments_info))
        if keep is not None:
            keep(work, picture, done)

    return count


def serve(
    app: Any,
    bound: socket.socket,
    ready: Callable[[], None] | None = None,
    ending: Callable[[], None] | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM; a second one ends it at once.

    Args:
        app: of `make_app`.
        bound: of `listen`.
        ready: called when connections are taken.
        ending: called when the server begins to end, in a thread: ends the work, so that who waits hears why.
    """
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Ends the server by signals, and does not raise them again: the end is a clean one."""
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if ready is not None and self.started:
                ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # connections that are cut are no faults
            if ending is not None:
                threading.Thread(target=ending, daemon=True).start()
            await super().shutdown(sockets)

    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=LEAVE)
    Server(config).run(sockets=[bound])


def public_address(bound: socket.socket) -> str:
    """Makes gradio's tunnel to a port of this machine, and returns its address.

    Raises:
        UserError: the tunnel's server cannot be reached.
    """
    import secrets

    from gradio.networking import setup_tunnel

    try:
        return setup_tunnel("127.0.0.1", bound.getsockname()[1], secrets.token_urlsafe(32), None, None)
    except Exception as error:  # of a download, a process and a network, nowhere listed
        raise BackendError(
            f"--share: gradio's tunnel cannot be made ({' '.join(str(error).split())[:200]}); leave --share out, or "
            "use --host and --auth in a network that you trust"
        ) from None


def exposed(address: Address, public: str = "") -> list[str]:
    """Says in lines what a server's address exposes to whom."""
    lines = []
    guarded = "who has the password" if address.auth else "anybody"
    if address.host not in LOCAL:
        lines.append(
            f"--host {address.host}: {guarded} who reaches this machine's port can use the page, the API and its "
            f"processor{'' if address.auth else '; --auth USER:PASSWORD asks for a password'}"
        )
        if address.auth:
            lines.append("the connection is not encrypted: a password is read by who reads the network")
    if public:
        lines.append(
            f"--share: {guarded} on the internet who has {public} can use the page, the API and this machine's "
            f"processor; pictures go through gradio's server"
        )
    return lines


def check_auth(text: str, where: str) -> str:
    """Checks "USER:PASSWORD".

    Raises:
        ArgumentError: another form; the text itself is not told.
    """
    user, colon, password = text.partition(":")
    if not colon or not user or not password or any(ord(each) < 32 for each in text):
        raise ArgumentError(f"{where}: USER:PASSWORD in one line expected")
    return text
