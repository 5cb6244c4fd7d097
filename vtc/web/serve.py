"""`vtc demo --web`: check, load, serve until Ctrl-C, leave nothing behind."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address

from ..commands.loading import DRAWERS, UsageError
from ..errors import VtcError

HOST, PORT = "127.0.0.1", 7860
WAIT = 3  # seconds for requests that still run at the end


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `vtc demo` that belong to the page."""
    group = parser.add_argument_group("as a web page")
    group.add_argument("--web", action="store_true", help="serve a page to try it out (Gradio)")
    group.add_argument("--host", help=f"address to listen at (default {HOST}: only here)")
    group.add_argument("--port", type=_port, help=f"default {PORT}; 0: any that is free")


def run(args: argparse.Namespace) -> int:
    """Serve the page. Returns the exit code."""
    if importlib.util.find_spec("gradio") is None:
        raise VtcError(
            "`vtc demo --web` needs gradio: pip install 'vision-token-compression[gradio]'"
        )
    if args.model in DRAWERS:
        raise UsageError(
            f"{args.model!r} answers no questions: it is in the page's tab Diffusion anyway. Leave "
            f"--model out, or give a model that answers."
        )
    host = HOST if args.host is None else args.host
    wanted = PORT if args.port is None else args.port
    with _until_ended(), _listening(host, wanted) as listener, _folder():
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
        import uvicorn

        from .app import build, server
        from .models import ANSWERERS, Models

        # whoever is on this machine could load its folders anyway, others must not
        names = None if is_local(host) else (args.model, *ANSWERERS, *DRAWERS)
        app = server(build(Models(allowed=names), args.model), is_local(host))
        address, port = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        print(f"vtc: http://{shown}:{port}  (Ctrl-C ends it)", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=WAIT)
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number from 0 to 65535")
    return int(text)


def is_local(host: str) -> bool:
    """Whether that name is one of this machine for itself."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _until_ended() -> Iterator[None]:
    """Ctrl-C and SIGTERM end it in good order: what was uploaded is deleted."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print("vtc: ended", flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at that address, taken before anything is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise VtcError(
            f"cannot listen at {host}, port {port}: {error.strerror or error}. Give another "
            f"--port (0: any that is free) or --host."
        ) from error
    with listener:
        yield listener


@contextmanager
def _folder() -> Iterator[None]:
    """Uploads go to a folder of their own, which is deleted at the end."""
    old = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="vtc-web-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield
        finally:
            if old is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = old
