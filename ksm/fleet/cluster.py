"""The Dask cluster that does the work: one of its own on this machine, or any that runs."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import tempfile
import time
import urllib.parse
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import resource_tracker
from typing import Any

from ksm.errors import KsmError, SchedulerLostError, SourceError, UnsupportedError, WorkersGoneError
from ksm.fleet.extras import need
from ksm.threads import usable_cpus

CONNECT_SECONDS = 10.0
_RETRY_SECONDS = 0.2
_MOST_GREETING = 1 << 20  # bytes that a scheduler says of itself
_QUIET_SECONDS = 2.0  # between two looks whether the scheduler and the workers are still there


@dataclass(frozen=True, slots=True)
class Tls:
    """The files that TLS takes: the CA's certificate, one's own and its key.

    >>> Tls("ca.pem", "cert.pem", "key.pem").ca
    'ca.pem'
    """

    ca: str
    cert: str
    key: str


@contextlib.contextmanager
def local(workers: int | None = None, memory: str | int = "auto") -> Iterator[Any]:
    """A `distributed.Client` of a cluster of its own on this machine, which ends with the `with`.

    Args:
        workers: processes of one thread each; None: one a CPU that this process may use.
        memory: of each worker, as Dask's `memory_limit`.

    >>> with local(1) as client:
    ...     client.submit(sum, [1, 2]).result()
    3
    """
    distributed = need("distributed")
    dask = need("dask")
    with (
        tempfile.TemporaryDirectory(prefix="ksm-fleet-", ignore_cleanup_errors=True) as directory,
        dask.config.set(temporary_directory=directory),  # the scheduler takes no argument for it
        _quiet(),
    ):
        with _not_interrupted():
            cluster = distributed.LocalCluster(
                n_workers=workers or usable_cpus(),
                threads_per_worker=1,
                processes=True,
                dashboard_address="127.0.0.1:0",  # any port: nothing is served there without bokeh
                memory_limit=memory,
                local_directory=directory,
                silence_logs=logging.CRITICAL,
            )
        try:
            with distributed.Client(cluster) as client:
                yield client
        finally:
            cluster.close()


@contextlib.contextmanager
def _not_interrupted() -> Iterator[None]:
    """Threads and processes that start here never get SIGINT: Ctrl-C is for this thread, which then ends them all.

    It is blocked and not ignored, so that one that comes meanwhile is delivered at the end.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # it would unblock the signal when the first process is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What Dask and its event loop would log, tracebacks among it, becomes one exception of ours."""
    need("distributed")  # it sets levels when it is imported
    names = [name for name in [*logging.root.manager.loggerDict] if name.startswith(("distributed", "tornado"))]
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def connect(scheduler: str, tls: Tls | None = None, seconds: float = CONNECT_SECONDS) -> Iterator[Any]:
    """A `distributed.Client` of a scheduler that runs, tcp://HOST:PORT or tls://HOST:PORT, checked by `check`.

    Raises:
        SchedulerLostError: nobody answers there.
        SourceError: a certificate cannot be read. ValueError: not such an address.
        UnsupportedError: as `check`.

    >>> with connect("tcp://127.0.0.1:1", seconds=0.1):
    ...     pass
    Traceback (most recent call last):
    ksm.errors.SchedulerLostError: tcp://127.0.0.1:1: no scheduler answers (...)
    """
    distributed = need("distributed")
    where = _address(scheduler)
    if (tls is not None) is not scheduler.startswith("tls://"):
        raise ValueError(f"{scheduler}: tls:// takes --tls-ca, --tls-cert and --tls-key, and tcp:// none of them")
    security = None
    if tls is not None:
        for path in (tls.ca, tls.cert, tls.key):
            if not os.access(path, os.R_OK):
                raise SourceError(f"{path}: cannot be read")
        security = distributed.Security(
            tls_ca_file=tls.ca, tls_client_cert=tls.cert, tls_client_key=tls.key, require_encryption=True
        )
    with _quiet():
        try:
            _greeted(where, security, seconds)
            client = distributed.Client(scheduler, timeout=seconds, security=security, set_as_default=False)
        except (OSError, ValueError, RuntimeError, distributed.TimeoutError) as error:
            why = (
                ""
                if isinstance(error, (TimeoutError, distributed.TimeoutError))
                else f" ({' '.join(str(error).split())[:200]})"
            )
            raise SchedulerLostError(f"{scheduler}: no scheduler answers{why}") from None
        try:
            check(client)
            yield client
        finally:
            with contextlib.suppress(Exception):  # gone, perhaps
                client.close(timeout=5)


def _address(scheduler: str) -> tuple[str, int]:
    """Host and port."""
    try:
        parts = urllib.parse.urlsplit(scheduler)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not scheduler.startswith(("tcp://", "tls://")) or not host or not port:
        raise ValueError(f"{scheduler!r} is not the address of a scheduler, such as tcp://10.0.0.1:8786")
    return host, port


def _greeted(where: tuple[str, int], security: Any, seconds: float) -> None:
    """Wait for what a scheduler says first: the length of a frame, in 8 bytes. A `Client` would wait for ever for one
    that says nothing, and take as much memory as the first bytes of any other server ask for.
    """
    context = security.get_connection_args("client")["ssl_context"] if security else None
    deadline = time.monotonic() + seconds
    while True:
        try:
            with (
                socket.create_connection(where, timeout=max(deadline - time.monotonic(), _RETRY_SECONDS)) as plain,
                context.wrap_socket(plain) if context else plain as peer,
                peer.makefile("rb") as file,
            ):
                said = file.read(8)
            break
        except ConnectionRefusedError:  # it may be about to start
            if time.monotonic() > deadline:
                raise
            time.sleep(min(_RETRY_SECONDS, seconds))
    if len(said) < 8 or int.from_bytes(said, "little") > _MOST_GREETING:
        raise ValueError("what answers is something else")


def ksm_version() -> str:
    """The version of ksm where this runs.

    >>> bool(ksm_version())
    True
    """
    try:
        return version("ksm")
    except PackageNotFoundError:
        return "not installed"


def check(client: Any) -> None:
    """Whether the cluster has workers, and all of them this version of ksm.

    Raises:
        UnsupportedError: it has none, or a worker has another version; the message names it.

    >>> with local(1) as client:
    ...     check(client)
    """
    mine = ksm_version()
    answers = client.run(ksm_version, on_error="return")
    if not answers:
        raise UnsupportedError(f"{client.scheduler.address}: no workers")
    for address, answer in sorted(answers.items()):
        if isinstance(answer, BaseException):
            raise UnsupportedError(f"worker {address} cannot run ksm {mine}: {type(answer).__name__}: {answer}")
        if answer != mine:
            raise UnsupportedError(f"worker {address} has ksm {answer}, and this is ksm {mine}: results may differ")


def places(client: Any) -> Mapping[str, Sequence[str]]:
    """The workers' addresses by the host that they run on.

    >>> with local(1) as client:
    ...     [len(addresses) for addresses in places(client).values()]
    [1]
    """
    result: dict[str, list[str]] = {}
    for address, about in client.scheduler_info(n_workers=-1)["workers"].items():
        result.setdefault(about["host"], []).append(address)
    return {place: sorted(addresses) for place, addresses in sorted(result.items())}


def everywhere(client: Any, function: Any, *arguments: Any) -> dict[str, Any]:
    """What a function gives on one worker of each host, by host.

    Raises:
        SchedulerLostError, KsmError: a host could not answer.

    >>> with local(2) as client:
    ...     list(everywhere(client, sum, [1, 2]).values())
    [3]
    """
    distributed = need("distributed")
    where = places(client)
    first = {addresses[0]: place for place, addresses in where.items()}
    try:
        answers = client.run(function, *arguments, workers=list(first), on_error="return")
    except (OSError, distributed.TimeoutError) as error:
        raise SchedulerLostError(f"{client.scheduler.address}: {error or 'does not answer'}") from None
    for address, answer in answers.items():
        if isinstance(answer, KsmError):
            raise answer
        if isinstance(answer, BaseException):
            raise KsmError(f"worker {address}: {type(answer).__name__}: {answer}")
    return {first[address]: answer for address, answer in answers.items()}


# ---- waiting ----------------------------------------------------------------------------------------


def first_done(client: Any, running: Collection[Any], needed: Iterable[tuple[str, ...]] = ()) -> set[Any]:
    """Those of some futures that are done, as soon as one is.

    Args:
        client: whose futures they are.
        running: the futures.
        needed: hosts; one of each tuple must have a worker, or what runs there alone would never be done.

    Raises:
        SchedulerLostError: the scheduler went away, or all workers. WorkersGoneError: those of needed hosts.

    >>> with local(1) as client:
    ...     [result(client, future) for future in first_done(client, [client.submit(sum, [1, 2])])]
    [3]
    """
    distributed = need("distributed")
    while True:
        try:
            with client.as_current():  # `wait` asks the current client; of a dict it would look at the values
                return set(distributed.wait(list(running), timeout=_QUIET_SECONDS, return_when="FIRST_COMPLETED").done)
        except distributed.TimeoutError:  # before Python 3.11 not the built-in one
            _alive(client, needed)
        except Exception as error:
            raise _lost(client, error) from None


def _alive(client: Any, needed: Iterable[tuple[str, ...]]) -> None:
    try:
        client.sync(client.scheduler.identity, callback_timeout=CONNECT_SECONDS)
        there = set(places(client))
    except Exception as error:
        raise _lost(client, error) from None
    if client.status != "running":
        return
    if not there:
        raise SchedulerLostError(f"{client.scheduler.address}: no workers are left")
    if gone := {host for hosts in needed if not there & set(hosts) for host in hosts}:
        raise WorkersGoneError(gone)


def _lost(client: Any, error: BaseException) -> KsmError:
    address = getattr(client.scheduler, "address", "the scheduler")
    return SchedulerLostError(f"{address}: the scheduler went away ({type(error).__name__})")


def result(client: Any, future: Any, needed: Iterable[tuple[str, ...]] = ()) -> Any:
    """What a future that is done gives; if its worker dies with it, what another worker makes of it.

    Args:
        client: whose future it is.
        future: one of `first_done`.
        needed: hosts, as of `first_done`.

    Raises:
        SchedulerLostError: it went with the scheduler, or with all workers. WorkersGoneError: with those of needed
        hosts. KsmError: its workers died over and over, or were too small; and whatever the work itself raised.

    >>> with local(1) as client:
    ...     result(client, client.submit(len, "abc"))
    3
    """
    distributed = need("distributed")
    patience = _QUIET_SECONDS
    while True:
        try:
            return future.result(timeout=patience)
        except distributed.KilledWorker as error:
            raise KsmError(f"workers died over and over on one task: {' '.join(str(error).split())[:300]}") from None
        except MemoryError:
            raise KsmError("a worker ran out of memory: more --ranges make smaller ones") from None
        except distributed.TimeoutError as error:
            if future.status == "error":  # the work's own
                raise
            if future.status == "cancelled" or client.status != "running":
                raise _lost(client, error) from None
            _alive(client, needed)
            patience *= 2  # what is large takes its time
        except Exception as error:
            if future.status == "cancelled" or client.status != "running":
                raise _lost(client, error) from None
            raise
