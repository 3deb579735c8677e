"""The Dask cluster that does the work: one of its own on this machine, or any that runs."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ksm.errors import KsmError, SchedulerLostError, SourceError, UnsupportedError
from ksm.fleet.extras import need

CONNECT_SECONDS = 10.0


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
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="ksm-fleet-") as directory:
        cluster = distributed.LocalCluster(
            n_workers=workers or cpus,
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
def connect(scheduler: str, tls: Tls | None = None, seconds: float = CONNECT_SECONDS) -> Iterator[Any]:
    """A `distributed.Client` of a scheduler that runs, tcp://HOST:PORT or tls://HOST:PORT, checked by `check`.

    Raises:
        SchedulerLostError: nobody answers there.
        SourceError: a certificate cannot be read. ValueError: not such an address.
        UnsupportedError: as `check`.

    >>> with connect("tcp://127.0.0.1:1", seconds=0.1):
    ...     pass
    Traceback (most recent call last):
    ksm.errors.SchedulerLostError: tcp://127.0.0.1:1: no scheduler answers
    """
    distributed = need("distributed")
    if not scheduler.startswith(("tcp://", "tls://")):
        raise ValueError(f"{scheduler!r} is not the address of a scheduler, such as tcp://10.0.0.1:8786")
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
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    try:
        client = distributed.Client(scheduler, timeout=seconds, security=security, set_as_default=False)
    except (OSError, TimeoutError, ValueError, RuntimeError) as error:
        why = "" if isinstance(error, TimeoutError) else f" ({' '.join(str(error).split())[:200]})"
        raise SchedulerLostError(f"{scheduler}: no scheduler answers{why}") from None
    try:
        check(client)
        yield client
    finally:
        with contextlib.suppress(Exception):  # gone, perhaps
            client.close(timeout=5)


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
    where = places(client)
    first = {addresses[0]: place for place, addresses in where.items()}
    try:
        answers = client.run(function, *arguments, workers=list(first), on_error="return")
    except (OSError, TimeoutError) as error:
        raise SchedulerLostError(f"{client.scheduler.address}: {error or 'does not answer'}") from None
    for address, answer in answers.items():
        if isinstance(answer, KsmError):
            raise answer
        if isinstance(answer, BaseException):
            raise KsmError(f"worker {address}: {type(answer).__name__}: {answer}")
    return {first[address]: answer for address, answer in answers.items()}
