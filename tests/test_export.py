"""`ksm export`: its metrics, judged by promtool and a real Prometheus beside node_exporter; clients of all kinds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

import ksm
from ksm.cli import main
from ksm.cli.export import Server, render
from ksm.exporter import Collector
from ksm.linux import KSM_ROOT, Host
from ksm.observe import Observer
from ksm.sysfs import ATTRIBUTES
from tests.test_advise import Kernel, guest, kernel, machine_that_runs, random_pages
from tests.test_cli import environment
from tests.test_linux import drives_the_kernel
from tests.test_observe import MadeUp, stat

assert kernel  # a fixture
DOCS = Path(__file__).parents[1] / "docs"
needs_docs = pytest.mark.skipif(not DOCS.exists(), reason="the documents are not here")
needs_ksm = pytest.mark.skipif(not Path(KSM_ROOT, "run").exists(), reason="the running kernel has no KSM")
promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not here")
prometheus = pytest.mark.skipif(
    not all(map(shutil.which, ("prometheus", "prometheus-node-exporter"))), reason="no prometheus, or no node_exporter"
)
OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


def values(page: str) -> dict[str, float]:
    """Every sample of a page, by name and labels."""
    return {
        s.name + "".join(f"{{{k}={v}}}" for k, v in sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(page)
        for s in family.samples
    }


# ---- the metrics ------------------------------------------------------------------------------------------------


def machine() -> ksm.Machine:
    """Two guests alike, one that shares nothing."""
    m = machine_that_runs(advisor_mode="scan-time")
    for name, seed in (("twin 1", 0), ("twin 2", 0), ('lone "\\\n\u00e9', 1)):
        guest(m, name, random_pages(400, seed))
    m.run_for(30)
    return m


def page_of(system: Any, processes: int = 20, accept: str = "") -> str:
    body, _ = render(Collector(Observer(system), processes))(accept)
    return body.decode()


def test_every_file_and_what_derives_from_it() -> None:
    m = machine()
    found = values(page_of(m))
    stats = m.ksm.snapshot()
    assert found["ksm_up"] == 1
    assert found["ksm_pages_sharing"] == stats.pages_sharing == 400
    assert found["ksm_full_scans_total"] == stats.full_scans
    assert found["ksm_general_profit_bytes"] == stats.general_profit
    assert found["ksm_sleep_seconds"] == 0.02
    assert found["ksm_advisor_mode{mode=scan-time}"] == 1 and found["ksm_advisor_mode{mode=none}"] == 0
    assert found["ksm_advisor_max_cpu_ratio"] == 0.7
    assert found["ksm_sharing_ratio"] == stats.sharing_ratio
    assert found["ksm_ksmd_cpu_seconds_total"] == pytest.approx(m.ksmd.cpu_seconds)
    assert (found["ksm_processes"], found["ksm_processes_losing"]) == (3, 1)
    assert found['ksm_process_profit_bytes{name=lone "\\\n\u00e9}{pid=3}'] == -400 * 64
    text = " ".join(found)
    for name in ATTRIBUTES:
        stem = {"sleep_millisecs": "sleep_seconds", "ksm_zero_pages": "zero_pages",
                "stable_node_chains_prune_millisecs": "stable_node_chains_prune_seconds"}.get(name, name)  # fmt: skip
        assert f"ksm_{stem}" in text, name


def test_a_loss_is_negative() -> None:
    m = machine_that_runs()
    guest(m, "lone", random_pages(100))
    m.run_for(5)
    assert values(page_of(m))["ksm_general_profit_bytes"] == values(page_of(m))["ksm_profit_bytes"] == -6400


def test_processes_are_bounded() -> None:
    m = machine_that_runs()
    for k in range(30):
        guest(m, f"vm{k}", random_pages(10, 0 if k < 20 else k))
    guest(m, "loser", random_pages(2000, 99))
    m.run_for(10)
    found = values(page_of(m, 5))
    shown = [name for name in found if name.startswith("ksm_process_profit_bytes")]
    assert len(shown) == 5 and any("loser" in name for name in shown), "the largest loss is among them"
    assert found["ksm_processes"] == 31
    assert not [name for name in values(page_of(m, 0)) if name.startswith("ksm_process_")]
    with pytest.raises(ValueError, match="-1 processes"):
        Collector(Observer(m), -1)


def test_made_up_hosts(tmp_path: Path) -> None:
    new = MadeUp(tmp_path / "new")
    (new.root / "from_the_future").write_text("-7\n")
    new.process(100, stat(10, 3))
    found = values(page_of(new.host))
    assert found["ksm_other{file=from_the_future}"] == -7 and found["ksm_process_rmap_items{name=guest}{pid=100}"] == 10
    old = MadeUp(tmp_path / "old", "5.15")
    found = values(page_of(old.host))
    assert "ksm_general_profit_bytes" not in found and found["ksm_run"] == 0
    (old.root / "pages_shared").unlink()
    assert "ksm_up" in values(page_of(old.host))
    (old.root / "run").write_text("many\n")
    assert values(page_of(old.host)) == {"ksm_up": 0}, "what cannot be read is said, and nothing else"


def test_looks_are_shared(tmp_path: Path) -> None:
    made = MadeUp(tmp_path)
    collector = Collector(Observer(made.host))
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    assert registry.get_sample_value("ksm_pages_shared") == 0
    (made.root / "pages_shared").write_text("5\n")
    assert registry.get_sample_value("ksm_pages_shared") == 0, "a second one within a second"
    assert collector._last is not None
    time.sleep(1.01)
    assert registry.get_sample_value("ksm_pages_shared") == 5


@promtool
def test_promtool_accepts_them(tmp_path: Path) -> None:
    """The text format is linted; OpenMetrics, with times added, is read into a database."""
    page = page_of(machine())
    lint = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True)
    assert (lint.returncode, lint.stderr + lint.stdout) == (0, "")
    page = page_of(machine(), accept=OPEN_METRICS)
    assert page.endswith("# EOF\n") and len(list(openmetrics.text_string_to_metric_families(page))) > 40
    timed = re.sub(r"(?m)^(ksm_.*) (\S+)$", r"\1 \2 1700000000", page)
    (tmp_path / "page").write_text(timed)
    into = ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(tmp_path / "page"), str(tmp_path / "blocks")]
    made = subprocess.run(into, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (tmp_path / "page").write_text(timed.replace("# EOF\n", ""))
    assert subprocess.run(into, capture_output=True).returncode != 0, "the judge does judge"


@promtool
@needs_docs
def test_promtool_accepts_the_rules() -> None:
    where = DOCS / "alerts"
    for arguments in (["check", "rules", "ksm.rules.yml"], ["test", "rules", "ksm.rules.test.yml"],
                      ["check", "config", "prometheus.yml"]):  # fmt: skip
        done = subprocess.run(["promtool", *arguments], cwd=where, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def expressions() -> list[str]:
    dashboard = json.loads((DOCS / "grafana/ksm.json").read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    found += re.findall(r"expr: (ksm.*|rate.*)", (DOCS / "alerts/ksm.rules.yml").read_text())
    return found


@needs_docs
def test_dashboard_and_rules_name_metrics_that_exist() -> None:
    m = machine()
    collector = Collector(Observer(m))
    list(collector.collect())
    m.run_for(30)  # a second look knows how long a pass takes
    body, _ = render(collector)("")
    exported = {name.partition("{")[0] for name in values(body.decode())}
    exported |= {"ksm_cow_copies_total", "ksm_swapin_copies_total"}
    used = {name for expr in expressions() for name in re.findall(r"\bksm_\w+", expr)}
    assert len(used) > 20 and used <= exported, used - exported


# ---- a real Prometheus ------------------------------------------------------------------------------------------


@dataclass
class Site:
    """Three programs: our exporter, node_exporter's ksmd collector, and the Prometheus that scrapes both."""

    url: str
    exporter: str

    def query(self, expression: str) -> dict[str, float]:
        text = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{text}", timeout=10) as reply:
            answer = json.load(reply)
        assert answer["status"] == "success"
        return {s["metric"].get("job", ""): float(s["value"][1]) for s in answer["data"]["result"]}

    def wait(self, expression: str, seconds: float = 20.0) -> dict[str, float]:
        deadline = time.monotonic() + seconds
        while not (found := self.query(expression)):
            assert time.monotonic() < deadline, f"{expression} stays empty"
            time.sleep(0.1)
        return found


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextlib.contextmanager
def program(*command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (
        open(log, "wb") as output,
        subprocess.Popen(command, cwd="/", env=environment(), stdout=output, stderr=output) as running,
    ):
        try:
            yield running
        finally:
            running.kill()


def until_it_answers(url: str, log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    where = tmp_path_factory.mktemp("prometheus")
    ours, node, server = (f"127.0.0.1:{free_port()}" for _ in range(3))
    jobs = "".join(
        f"- {{job_name: {job}, static_configs: [{{targets: ['{target}']}}]}}\n"
        for job, target in (("ksm", ours), ("node", node))
    )
    config = "global: {scrape_interval: 500ms, scrape_timeout: 500ms}\nscrape_configs:\n" + jobs
    (where / "p.yml").write_text(config)
    node_exporter = ("prometheus-node-exporter", f"--web.listen-address={node}", "--collector.disable-defaults",
                     "--collector.ksmd")  # fmt: skip
    database = ("prometheus", f"--config.file={where / 'p.yml'}", f"--storage.tsdb.path={where / 'data'}",
                f"--web.listen-address={server}")  # fmt: skip
    with (
        program(sys.executable, "-m", "ksm", "export", "--listen", ours, log=where / "ksm.log"),
        program(*node_exporter, log=where / "node.log"),
        program(*database, log=where / "prometheus.log"),
    ):
        for name, url in (("ksm", f"{ours}/metrics"), ("node", f"{node}/metrics"), ("prometheus", f"{server}/-/ready")):
            until_it_answers(f"http://{url}", where / f"{name}.log")
        yield Site(f"http://{server}", f"http://{ours}/metrics")


SAME = {
    "full_scans_total": "full_scans_total",
    "merge_across_nodes": "merge_across_nodes",
    "pages_shared": "pages_shared",
    "pages_sharing": "pages_sharing",
    "pages_to_scan": "pages_to_scan",
    "pages_unshared": "pages_unshared",
    "pages_volatile": "pages_volatile",
    "run": "run",
    "sleep_seconds": "sleep_seconds",
}


@drives_the_kernel
@prometheus
def test_prometheus_sees_what_node_exporter_sees(site: Site, kernel: Kernel) -> None:
    pages = random_pages(600)
    pages[100:200] = pages[:100]
    kernel.mark(pages)
    kernel.passes()
    kernel.set(run=0)
    merged = kernel.ksm.snapshot()
    assert merged.pages_sharing == 100 and merged.general_profit is not None
    deadline = time.monotonic() + 10
    while True:  # each exporter is scraped when Prometheus comes to it
        found = {name: (site.query(f"ksm_{name}"), site.query(f"node_ksmd_{name}")) for name in SAME}
        told = all(set(ours) == {"ksm"} and set(theirs) == {"node"} for ours, theirs in found.values())
        if (
            told
            and found["pages_sharing"] == ({"ksm": 100}, {"node": 100})
            and found["run"] == ({"ksm": 0}, {"node": 0})
        ):
            break
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    for name, (ours, theirs) in found.items():
        assert ours["ksm"] == theirs["node"], name
    everything = site.query('count({__name__=~"node_ksmd_.*"})')
    assert everything[""] == len(SAME), "every figure of node_exporter's was compared"
    assert site.query("ksm_general_profit_bytes") == {"ksm": merged.general_profit}
    assert site.query("ksm_saved_bytes") == {"ksm": 100 * 4096}
    mine = site.query(f'ksm_process_merging_pages{{pid="{os.getpid()}"}}')
    assert mine == {"ksm": 200}
    kernel.mark(random_pages(20_000, 7))
    kernel.passes(3)
    kernel.set(run=0)
    profit = kernel.ksm.general_profit
    assert profit < 0 and site.wait(f"ksm_general_profit_bytes == {profit}") == {"ksm": profit}


@needs_ksm
@needs_docs
@prometheus
def test_prometheus_takes_every_expression(site: Site) -> None:
    site.wait("ksm_up == 1")
    for expression in expressions():
        plain = expression.replace("$__rate_interval", "1m").replace("$instance", ".*")
        site.query(plain)
    assert site.wait('up{job="ksm"} == 1') == {"ksm": 1}


# ---- clients ----------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Server]:
    it = Server(("127.0.0.1", 0), socket.AF_INET, render(Collector(Observer(machine_that_runs()))))
    thread = threading.Thread(target=it.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield it
    finally:
        it.shutdown()
        thread.join()
        it.server_close()


def connect(server: Server) -> socket.socket:
    return socket.create_connection(server.server_address[:2], timeout=10)  # type: ignore[arg-type]


def ask(server: Server, data: bytes) -> bytes:
    with connect(server) as client:
        reply = b""
        with contextlib.suppress(ConnectionError):
            client.sendall(data)
            while more := client.recv(65536):
                reply += more
        return reply


GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


def test_only_get(server: Server) -> None:
    assert ask(server, GET).startswith(b"HTTP/1.0 200 OK\r\n")
    assert b"\r\nContent-Type: text/plain; version=" in ask(server, GET)
    accept = GET.replace(b"\r\n\r\n", b"\r\nAccept: application/openmetrics-text\r\n\r\n")
    assert b"Content-Type: application/openmetrics-text" in ask(server, accept)
    assert b"/metrics" in ask(server, b"GET / HTTP/1.0\r\n\r\n")
    assert ask(server, b"GET /metrics?x=1 HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 200")
    assert ask(server, b"GET /../../etc/passwd HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 404")
    for method in (b"HEAD", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE", b"CONNECT"):
        reply = ask(server, GET.replace(b"GET", method))
        assert reply.startswith(b"HTTP/1.0 405") and b"\r\nAllow: GET\r\n" in reply, method
    assert b" 501 " in ask(server, GET.replace(b"GET", b"BREW"))


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\xff\xfe" * 1000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 200 + b"\n",  # a TLS hello
        b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % k for k in range(500)) + b"\r\n",
        b"GET /metrics HTTP/1.1\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"GET /metrics HTTP/9.9\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nAccept: " + b"a/b;q=x," * 5000 + b"\r\n\r\n",
        b"\r\n" * 10,
        b"GET /metrics HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n" + b"z" * 100_000,
    ],
)
def test_junk(server: Server, data: bytes) -> None:
    start = time.monotonic()
    reply = ask(server, data)
    assert b"Traceback" not in reply and time.monotonic() - start < 5
    assert ask(server, GET).startswith(b"HTTP/1.0 200"), "and the next one is served"


def test_slow_and_many_clients(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksm.cli.export._LONGEST", 0.6)
    drops = [connect(server) for _ in range(100)]
    try:
        for client in drops:
            with contextlib.suppress(OSError):
                client.sendall(b"GET /met")
        start = time.monotonic()
        assert ask(server, GET).startswith(b"HTTP/1.0 200"), "served while a hundred others dawdle"
        assert time.monotonic() - start < 10  # one after the other they would take a minute
        assert len(server._open) <= 32 and threading.active_count() < 60
        slow = connect(server)
        drops.append(slow)
        with pytest.raises(OSError, match=r"reset|Broken pipe|abort"):  # a byte now and then does not keep it
            for _ in range(100):
                slow.sendall(b"X")
                time.sleep(0.05)
        deadline = time.monotonic() + 5
        while server._open:
            assert time.monotonic() < deadline, "everybody is hung up on in the end"
            time.sleep(0.05)
    finally:
        for client in drops:
            client.close()


def test_a_client_that_does_not_read(server: Server) -> None:
    with connect(server) as client:
        client.sendall(GET * 3)
        assert ask(server, GET).startswith(b"HTTP/1.0 200")


# ---- the program ------------------------------------------------------------------------------------------------


@needs_ksm
@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGINT])
def test_the_program(way: signal.Signals) -> None:
    command = [sys.executable, "-m", "ksm", "export", "--listen", "localhost:0"]
    with subprocess.Popen(command, cwd="/", env=environment(), stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        line = running.stderr.readline()
        assert re.fullmatch(r"ksm: listening on http://(127\.0\.0\.1|\[::1\]):\d+/metrics\n", line)
        with urllib.request.urlopen(line.split()[-1], timeout=10) as reply:
            assert values(reply.read().decode())["ksm_up"] == 1
        running.send_signal(way)
        assert running.wait(10) == 0
        assert running.stderr.read() == ""


@needs_ksm
def test_addresses(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("9799", ":9799", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:-1"):
        assert main(["export", "--listen", wrong]) == 2
    capsys.readouterr()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["export", "--listen", f"127.0.0.1:{taken.getsockname()[1]}"]) == 1
        assert "Address already in use: listening on 127.0.0.1:" in capsys.readouterr().err
    assert main(["export", "--listen", "no.such.host.invalid:1"]) == 1
    assert capsys.readouterr().err.startswith("ksm: ")


def test_without_ksm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("ksm.cli.export.Host", lambda: Host("/nonexistent"))
    assert main(["export"]) == 69
    assert capsys.readouterr().err.count("\n") == 1


def test_without_prometheus_client(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("prometheus_client")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ksm.UnsupportedError, match=r"ksm\[export\]"):
        Collector(Observer(ksm.Machine()))
