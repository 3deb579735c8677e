"""`ksm export`: KSM as Prometheus metrics over HTTP, on the loopback interface unless told otherwise."""

from __future__ import annotations

import contextlib
import errno
import http.server
import ipaddress
import socket
import sys
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import click

from ksm.errors import UnsupportedError, kernel_error
from ksm.exporter import Collector
from ksm.linux import Host
from ksm.observe import Observer

_MOST_CONNECTIONS = 32
_LONGEST = 10.0  # seconds from accept to the end of the answer
_QUIET = 5.0  # seconds between two packets
_INDEX = b"KSM metrics are at /metrics\n"


def _address(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, int]:
    """ "127.0.0.1:9799", "[::1]:9799", "name:9799": the callback of an option."""
    host, colon, port = value.rpartition(":")
    if not colon or not port.isdecimal() or not 0 <= int(port) <= 65535 or not host:
        raise click.BadParameter(f"{value!r} is not ADDRESS:PORT, such as 127.0.0.1:9799 or [::1]:9799", ctx, param)
    return host.removeprefix("[").removesuffix("]"), int(port)


@click.command()
@click.option(
    "--listen",
    default="127.0.0.1:9799",
    show_default=True,
    callback=_address,
    metavar="ADDRESS:PORT",
    help="Where to listen; port 0 takes a free one.",
)
@click.option("--processes", type=click.IntRange(0, 1000), default=20, show_default=True,
              help="Processes with metrics of their own: the largest profits and losses.")  # fmt: skip
def command(listen: tuple[str, int], processes: int) -> None:
    """Serve KSM's counters to Prometheus at http://ADDRESS:PORT/metrics.

    It answers GET only and changes nothing. As root it sees every process. It ends on Ctrl-C and SIGTERM.
    """
    host = Host()
    _ = host.ksm  # without KSM there is nothing to serve
    server = _server(listen, render(Collector(Observer(host), processes)))
    with server:
        shown, port = str(server.server_address[0]), server.server_address[1]
        print(f"ksm: listening on http://{f'[{shown}]' if ':' in shown else shown}:{port}/metrics", file=sys.stderr)
        if not ipaddress.ip_address(shown.partition("%")[0]).is_loopback:
            print("ksm: whoever reaches this address can read process names and counters", file=sys.stderr)
        sys.stderr.flush()
        with contextlib.suppress(KeyboardInterrupt, SystemExit):  # the ways to stop a server
            server.serve_forever()


Render = Callable[[str], "tuple[bytes, str]"]
"""From an Accept header to a page and its content type."""


def render(collector: Collector) -> Render:
    """The page of metrics, as OpenMetrics or in the older text format, as the client asks."""
    try:
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder
    except ImportError:
        raise UnsupportedError("exporting metrics needs prometheus-client: pip install 'ksm[export]'") from None

    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)

    def answer(accept: str) -> tuple[bytes, str]:
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    return answer


class Server(http.server.ThreadingHTTPServer):
    """Serves pages to few clients at a time, and lets none of them keep it: not slow ones, not many."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # five, the default, make others wait for seconds behind a hostile client

    def __init__(self, address: tuple[str, int], family: socket.AddressFamily, render: Render) -> None:
        self.address_family = family
        self.render = render
        self._open: dict[socket.socket, float] = {}  # by when it was accepted, the oldest first
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Bind, without the look-up of this host's name that http.server does."""
        socket.socket.setsockopt(self.socket, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin with a connection; where there are too many, the oldest has had its time."""
        while len(self._open) >= _MOST_CONNECTIONS:
            self._hang_up(next(iter(self._open)))
        self._open[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no more threads
            self.shutdown_request(request)

    def service_actions(self) -> None:
        """Called twice a second: hang up on whoever is not done by now."""
        late = time.monotonic() - _LONGEST
        for request in [request for request, since in list(self._open.items()) if since < late]:
            self._hang_up(request)

    def _hang_up(self, request: socket.socket) -> None:
        self._open.pop(request, None)
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)  # its thread then reads the end of the connection

    def close_request(self, request: Any) -> None:
        """The end of a connection."""
        self._open.pop(request, None)
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or sent what is no HTTP: no concern of ours."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One request, then the connection ends."""

    server: Server
    server_version = "ksm"
    sys_version = ""
    timeout = _QUIET
    error_message_format = "%(code)d %(message)s\n"
    error_content_type = "text/plain"

    def do_GET(self) -> None:
        """The metrics, or a hint where they are."""
        path = self.path.partition("?")[0]
        if path == "/metrics":
            body, content_type = self.server.render(self.headers.get("Accept", ""))
        elif path == "/":
            body, content_type = _INDEX, "text/plain"
        else:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self) -> None:
        """Nothing but GET."""
        self.send_response(HTTPStatus.METHOD_NOT_ALLOWED)
        self.send_header("Allow", "GET")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged: a hostile client could fill a disk."""


def _server(listen: tuple[str, int], render: Render) -> Server:
    host, port = listen
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return Server((str(address[0]), int(address[1])), family, render)
    except socket.gaierror as error:
        raise kernel_error(errno.EADDRNOTAVAIL, f"{host}: {error.strerror}") from None
    except OSError as error:
        raise kernel_error(error.errno or errno.EIO, f"listening on {host}:{port}") from None
