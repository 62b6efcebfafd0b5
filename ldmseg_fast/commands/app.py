"""`ldmseg app` serves a model as a web page and an HTTP API on this machine."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmseg_fast.commands.options import add_speed_arguments, model_folders, speed_of, take_model

if TYPE_CHECKING:
    from ldmseg_fast.app.server import Address

AUTH = "LDMSEG_APP_AUTH"  # the variable that --auth is read from where the option is left out

EXAMPLES = (
    "ldmseg app",
    "ldmseg app --model MODEL_DIR --port 0 --keep visitors",
    "ldmseg app --host 0.0.0.0 --auth @password.txt",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        dest="model_dir",
        metavar="MODEL",
        default="tiny",
        help="MODEL_DIR, name of a shipped model (default tiny), or owner/name[@revision] of the Hugging Face Hub",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model of the Hub; default its main branch")
    parser.add_argument("--backend", default="torch", help="torch, compile, onnxruntime or tensorrt")
    parser.add_argument("--engine-dir", help="exported graphs or engines")
    add_speed_arguments(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)"
    )
    parser.add_argument("--port", type=int, default=7860, help="0: a free one (default 7860)")
    parser.add_argument("--share", action="store_true", help="make it public through gradio's tunnel")
    parser.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        help=f"ask for a password; @FILE reads it from a file; the variable {AUTH} does the same as the option",
    )
    parser.add_argument("--max-upload", type=int, default=64, metavar="MB", help="of one file (default 64)")
    parser.add_argument(
        "--max-pixels", type=int, default=2**25, metavar="N", help="refuse larger pictures (default 33554432)"
    )
    parser.add_argument("--queue", type=int, default=64, metavar="N", help="requests that may wait (default 64)")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="seconds that one request may take (default 120)"
    )
    parser.add_argument("--threads", type=int, help="of the model (default: all cores)")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep pictures and maps of visitors here (default: none)"
    )


def run(args: argparse.Namespace) -> int:
    """Serves until it is interrupted, and returns 0.

    Raises:
        ArgumentError: a port that is in use, or a password of another form.
        BackendError: gradio is not installed, or a backend that cannot run here.
    """
    from ldmseg_fast.app import server
    from ldmseg_fast.app.visitors import visitors_folder
    from ldmseg_fast.errors import ArgumentError, DataError
    from ldmseg_fast.files import read_text
    from ldmseg_fast.outputs import check_outputs

    take_model(args)
    if args.keep is not None:
        check_outputs({}, {"--keep": args.keep}, roots=[*model_folders(args.model_dir), args.engine_dir])
        args.keep.mkdir(parents=True, exist_ok=True)
    auth, where = args.auth, "--auth"
    if auth is None and AUTH in os.environ:
        auth, where = os.environ.pop(AUTH), AUTH
    if auth is not None and auth.startswith("@"):
        where = f"--auth {auth}"
        try:
            auth = read_text(auth[1:], DataError).strip("\r\n")
        except UnicodeDecodeError:
            raise ArgumentError(f"{where}: no text in UTF-8; a file with the line USER:PASSWORD expected") from None
    if auth is not None:
        auth = server.check_auth(auth, where)
    address = server.Address(args.host, args.port, auth, args.share)
    bound = server.listen(address.host, address.port)
    before = signal.signal(signal.SIGTERM, _end)  # until the server has its own
    try:
        with visitors_folder() as folder:
            server.require_gradio()
            return _serve(args, address, bound, folder)
    finally:
        signal.signal(signal.SIGTERM, before)
        bound.close()


def _end(number: int, frame: object) -> None:
    sys.exit(0)


def _serve(args: argparse.Namespace, address: Address, bound: socket.socket, folder: Path) -> int:
    from ldmseg_fast.app import server
    from ldmseg_fast.app.keep import Keeper
    from ldmseg_fast.app.limits import Limits
    from ldmseg_fast.app.metrics import PrometheusMetrics
    from ldmseg_fast.app.page import build
    from ldmseg_fast.app.process import ProcessWorker
    from ldmseg_fast.app.visitors import Sweeper
    from ldmseg_fast.app.work import left_out
    from ldmseg_fast.checkpoints.hub_names import shown_name

    limits = Limits(
        max_upload=args.max_upload * 2**20,
        max_pixels=args.max_pixels,
        queue=args.queue,
        timeout=args.timeout,
        metrics=PrometheusMetrics(),
    )
    backends = (args.backend, "torch") if args.backend != "torch" else ("torch",)
    for line in left_out(args.backend, speed_of(args)):
        print(line, file=sys.stderr, flush=True)
    own: dict[str, Any] = {"speed": speed_of(args), "max_pixels": args.max_pixels, "threads": args.threads}
    worker = ProcessWorker(args.model_dir, backends, args.engine_dir, **own)
    try:
        worker.keep = None if args.keep is None else Keeper(args.keep)
        app = server.make_app(worker, limits, folder, address.auth, build, server.only_local(bound, address))
        host, port = bound.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

        def ready() -> None:
            public = server.public_address(bound) if address.share else ""
            lines = [f"{shown_name(worker.info.folder)} at {url} (Ctrl-C ends it)", *server.exposed(address, public)]
            if args.keep is not None:
                lines.append(f"--keep: pictures and maps of visitors are kept in {args.keep}")
            print(*lines, sep="\n", flush=True)
            threading.Thread(target=worker.warm_up, daemon=True).start()

        with Sweeper(folder):
            server.serve(app, bound, ready, worker.close)
    finally:
        worker.close()
    print("stopped", flush=True)
    return 0
