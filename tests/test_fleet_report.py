"""The pages of a fleet and of its placement: their figures, and both in a real browser."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ksm.charts import DARK, LIGHT
from ksm.cli import main
from ksm.fleet import Analysis, Host, Placement, Vm, analyze, fingerprint_vm, place, read_fleet
from ksm.fleet import placing as placement_charts
from ksm.fleet.charts import figures
from ksm.fleet.placing import Comparison
from ksm.report import fleet_page, placement_page
from ksm.units import binary
from tests import chromium, fleets
from tests.test_report import CHARTS, CUT, OVERFLOW

LONG = "W" * 150
EVIL = "<script>alert(1)</script>"
BROKEN = '"><img src=x onerror=alert(2)>'
HOSTS = [Host(name=name, ram=16 << 20, reserve=1 << 20, vm_overhead=1000) for name in ("h0", "h1", LONG)]


def write(directory: Path, vms: int = 9) -> None:
    """VMs of three classes on five hosts, with names that would run, and a file that is damaged."""
    for n, image in enumerate(fleets.pages(3, vms)):
        host = BROKEN if n == 8 else LONG if n == 7 else f"h{n // 3}"
        name = "vm <b>&amp;" if n == 2 else f"vm{n}"
        vm = Vm(name=name, kind=("web", "", EVIL)[n % 3], host=host, ram=4 << 20)
        fingerprint_vm(image, directory, vm, threads=1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fleet")
    write(place)
    return place


@pytest.fixture(scope="module")
def answer(directory: Path) -> Analysis:
    bad = directory / f"{EVIL.replace('/', '_')}.pages.parquet"
    bad.write_bytes(b"no")
    found = analyze(directory, [Host(name="h0", max_page_sharing=2), Host(name="h1", use_zero_pages=True)])
    bad.unlink()
    assert not found.complete and len(found.hosts) == 5
    return found


@pytest.fixture(scope="module")
def compared(directory: Path) -> Comparison:
    vms, sketches = read_fleet([str(directory)])
    hosts = [*HOSTS, Host(name=EVIL, ram=16 << 20)]
    others: dict[str, Placement | str] = {
        method: place(vms, sketches, hosts, method) for method in ("today", "random", "decreasing", "class", "exact")
    }
    others["random"] = f"no room for {EVIL}"
    return Comparison(found=place(vms, sketches, hosts), others=others, vms=vms, hosts=hosts)


# ---- figures -------------------------------------------------------------------------------------------


def bars(chart: Any, field: str) -> dict[str, float]:
    """The sum of each bar of a stacked chart."""
    sums: dict[str, float] = {}
    for row in chart.data.to_dict()["values"]:
        sums[row["name"]] = sums.get(row["name"], 0.0) + row[field]
    return sums


def test_hosts_add_up(answer: Analysis) -> None:
    figure = figures(answer)["hosts"]
    assert answer.total.lost_to_limit > 0  # that makes adding up worth a test
    for row in answer.hosts:
        label = row.name if len(row.name) <= 18 else "…" + row.name[-17:]
        drawn = figure.chart.data.to_dict()["values"]
        parts = {one["part"]: one["amount"] for one in drawn if one["name"] == label}
        saved = sum(parts.values()) - parts["stays in memory"]
        assert saved * (1 << 20) == pytest.approx(row.saved_bytes, abs=300), row.name
        assert parts["stays in memory"] * (1 << 20) == pytest.approx(row.frames_bytes, abs=100)
    assert sum(bars(figure.chart, "share").values()) == pytest.approx(5, abs=1e-3)
    said = {row[0]: row for row in figure.rows}
    assert said["h1"][3] == binary(next(row for row in answer.hosts if row.name == "h1").saved_bytes)
    assert [row[0] for row in figure.rows] == [
        row.name for row in sorted(answer.hosts, key=lambda row: -row.saved_bytes)
    ]


def test_matrices_and_classes(answer: Analysis) -> None:
    found = figures(answer)
    assert list(found) == ["saving", "hosts", "memory", "classes", "pairs", "spread", "contents"]
    matrix = {
        (row[0], name): cell
        for row in found["classes"].rows
        for name, cell in zip(found["classes"].columns[1:], row[1:], strict=True)
    }
    for pair in answer.classes:
        names = ["…" + name[-17:] if len(name) > 18 else name or "(no class)" for name in (pair["a"], pair["b"])]
        assert matrix[names[0], names[1]] == matrix[names[1], names[0]] == binary(pair["bytes"])
    web = next(row for row in found["memory"].rows if row[0] == "web")
    of_class = [vm for vm in answer.vms if vm["class"] == "web"]
    assert web[1] == str(len(of_class))
    here, fleet = (sum(vm[field] for vm in of_class) for field in ("shared_on_host", "shared_in_fleet"))
    assert web[-2:] == (binary(here * 4096), binary((fleet - here) * 4096))
    assert (
        found["contents"].rows[0][-1] == "zero pages" and found["contents"].rows[0][2] == f"{answer.top[0]['copies']:,}"
    )


def test_pictures(answer: Analysis, tmp_path: Path) -> None:
    answer.chart("classes").save(tmp_path / "classes.svg")
    assert (tmp_path / "classes.svg").read_text().startswith("<svg")
    with pytest.raises(ValueError, match="no chart 'fits' of this fleet: there are saving, hosts"):
        answer.chart("fits")


def test_one_vm_has_nothing_to_compare(tmp_path: Path) -> None:
    fingerprint_vm(b"x" * 4096, tmp_path, Vm(name="only"))
    alone = analyze(tmp_path)
    assert list(figures(alone)) == ["saving", "hosts", "memory"]
    text = fleet_page(alone)
    assert "VMs with most copies on other hosts only" not in text and "<strong>0 B</strong> of 4.0 KiB saved" in text
    fingerprint_vm(b"\0" * 8192, tmp_path / "zeros", Vm(name="zeros", zeros="touched"))
    assert "contents" in figures(analyze(tmp_path / "zeros"))


def large(vms: int = 1000, hosts: int = 100, kinds: int = 30) -> Analysis:
    """A fleet of many VMs, counted from a table of their contents."""
    import dask.dataframe as dd
    import pandas as pd

    random = np.random.default_rng(5)
    high = np.concatenate([[n % kinds, 1000 + n % 7, 2000 + n] for n in range(vms)]).astype(np.uint64)
    names = np.repeat([f"vm{n}" for n in range(vms)], 3)
    table = pd.DataFrame(
        {"vm": names, "high": high << np.uint64(48), "low": np.uint64(1), "copies": np.int32(1)}
    ).sort_values(["vm", "high"])
    on = random.integers(0, hosts, vms)
    about = [
        Vm(name=f"vm{n}", kind=f"kind {n % kinds}", host=f"h{on[n]}", pages=4, zero_pages=1, contents=3)
        for n in range(vms)
    ]
    return analyze(dd.from_pandas(table, npartitions=1), vms=about)


@pytest.fixture(scope="module")
def many_hosts() -> Analysis:
    return large()


def test_many_hosts_are_capped_and_said(many_hosts: Analysis) -> None:
    found = figures(many_hosts)
    assert many_hosts.total.vms == 1000 and len(many_hosts.hosts) == 100
    assert found["hosts"].note == "Drawn are the 24 of 100 hosts that save most; the table has all."
    assert len(bars(found["hosts"].chart, "amount")) == 24 and len(found["hosts"].rows) == 100
    assert found["pairs"].note == "Shown are the 24 of 100 with most in common."
    assert found["spread"].note == "Shown are the largest: 24 of 30 classes, 24 of 100 hosts."
    text = fleet_page(many_hosts)
    assert "The first 50 of 1,000 VMs." in text and len(text) < 1_500_000


def test_methods_and_moves(compared: Comparison) -> None:
    found, today = compared.found, compared.others["today"]
    assert isinstance(today, Placement) and found.moves
    drawn = placement_charts.figures(compared)
    rows = {row[0]: row for row in drawn["methods"].rows}
    gained = found.saved.estimate - today.saved.estimate
    assert rows["by sharing"][1:3] == (binary(found.saved.estimate), f"+{binary(gained)}") and gained > 0
    assert rows["as today"][1:3] == (binary(today.saved.estimate), "+0 B")
    assert rows["random"] == ("random", *[""] * 8, f"no room for {EVIL}") and "nothing better" in rows["exact"][-1]
    last = drawn["moves"].rows[-1]
    assert last == (str(len(found.moves)), binary(sum(move.gain for move in found.moves)))
    hosts = {row[0]: row for row in drawn["hosts"].rows}
    for host in compared.hosts:
        then = [vm.ram for vm in compared.vms if found.where[vm.name][0] == host.name]
        before = [vm.ram for vm in compared.vms if vm.host == host.name]
        wanted = (
            str(len(before)),
            str(len(then)),
            binary(sum(before)),
            binary(sum(then)),
            binary(host.ram - host.reserve),
        )
        assert hosts[host.name][1:] == wanted


def test_a_placement_that_moves_nothing_or_lacks_room(directory: Path) -> None:
    vms, sketches = read_fleet([str(directory)])
    stays = [Vm.from_dict(vm.to_dict() | {"host": "h0"}) for vm in vms]
    room = [Host(name="h0", ram=1 << 30)]
    nothing = Comparison(found=place(stays, sketches, room, "today"), others={}, vms=stays, hosts=room)
    assert list(placement_charts.figures(nothing)) == ["methods", "hosts"]
    assert "saved, with no move." in placement_page(nothing)
    tight = [Host(name="h0", ram=sum(vm.ram for vm in vms) // 2)]
    short = Comparison(found=place(stays, sketches, tight, "today", overcommit=2.0), others={}, vms=stays, hosts=tight)
    text = placement_page(short)
    assert f"h0 lacks {binary(short.found.worst_bytes)}" in text and short.found.worst_bytes > 0


# ---- the commands --------------------------------------------------------------------------------------


def test_commands(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fleet = ["fleet", "analyze", str(directory), "--single"]
    assert main([*fleet, "--report", "fleet.html", "--json"]) == 0
    total = json.loads(capsys.readouterr().out)["total"]
    assert f"<strong>{binary(total['saved_bytes'])}</strong> of" in Path("fleet.html").read_text()
    assert main([*fleet, "--report", "fleet.html"]) == 2
    assert capsys.readouterr().err.strip().endswith("fleet.html exists; --force overwrites it")
    (tmp_path / "bad.pages.parquet").write_bytes(b"no")
    assert main([*fleet, "bad.pages.parquet", "--report", "fleet.html", "--force"]) == 3
    assert "1 file left out" in Path("fleet.html").read_text()
    assert main([*fleet, "--report", "fleet.pdf"]) == 2
    assert main([*fleet, "--report", "nowhere/fleet.html"]) == 66
    Path("hosts.yaml").write_text("[{name: h, count: 4, ram: 16M}]")
    placed = ["fleet", "place", str(directory), "--hosts", "hosts.yaml", "--report", "place.html"]
    capsys.readouterr()
    assert main([*placed, "--json"]) == 0
    saved = json.loads(capsys.readouterr().out)["saved"]
    assert f"<dd>{binary(saved['estimate'])}<small>95 %:" in Path("place.html").read_text()
    assert main(placed) == 2 and main([*placed, "--force"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bad.pages.parquet",
        "fleet.html",
        "hosts.yaml",
        "place.html",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_page_that_cannot_be_written_leaves_the_old_one(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import resource

    page = tmp_path / "fleet.html"
    page.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code = main(["fleet", "analyze", str(directory), "--single", "--report", str(page), "--force"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr()
    assert code == 74 and said.err == f"ksm: {page}: File too large\n"
    assert "Today KSM saves" in said.out  # the answer is shown all the same
    assert page.read_text() == "old" and list(tmp_path.iterdir()) == [page]


# ---- in a browser --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    if why := chromium.missing():
        pytest.skip(why)
    with chromium.browser(tmp_path_factory.mktemp("profile")) as session:
        yield session


@pytest.fixture(scope="module")
def pages(
    answer: Analysis, compared: Comparison, many_hosts: Analysis, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    place = tmp_path_factory.mktemp("pages")
    texts = {"fleet": fleet_page(answer), "placement": placement_page(compared), "large": fleet_page(many_hosts)}
    for name, text in texts.items():
        (place / f"{name}.html").write_text(text)
    return place


KINDS = {
    "fleet": {"saving", "hosts", "memory", "classes", "pairs", "spread", "contents"},
    "placement": {"methods", "moves", "hosts"},
    "large": {"saving", "hosts", "memory", "classes", "pairs", "spread", "contents"},
}
TABLE = """
const figure = document.getElementById(arguments[0]);
return [...figure.querySelectorAll('tbody tr')].map(row => [...row.children].map(cell => cell.textContent));
"""

MOVES = """
const rows = document.querySelectorAll('[aria-label="Moves in order"] tbody tr');
return [...rows].map(row => row.cells[1].textContent);
"""
TWICE = """
const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
return ids.filter((id, n) => ids.indexOf(id) !== n && !id.startsWith('vg-'));
"""


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("width", "dark"), [(1180, True), (375, False)])
def test_pages_render(browser: chromium.Browser, pages: Path, name: str, width: int, dark: bool) -> None:
    path = pages / f"{name}.html"
    browser.look(width, dark=dark)
    browser.open(path)
    charts = dict(browser.run(CHARTS))
    assert set(charts) == KINDS[name] and all(marks > 2 for marks in charts.values()), charts
    assert browser.run(OVERFLOW) <= 0 and browser.run(CUT) == []
    assert browser.logged() == [] and browser.requests() == [path.as_uri()]
    ground = (DARK if dark else LIGHT)["page"]
    rgb = f"rgb({', '.join(str(int(ground[at : at + 2], 16)) for at in (1, 3, 5))})"
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == rgb


def test_tables_have_the_figures(
    browser: chromium.Browser, pages: Path, answer: Analysis, compared: Comparison
) -> None:
    browser.look()
    for name, drawn in (("fleet", figures(answer)), ("placement", placement_charts.figures(compared))):
        browser.open(pages / f"{name}.html")
        for kind, figure in drawn.items():
            assert browser.run(TABLE, kind) == [list(row) for row in figure.rows], kind
    moves = browser.run(MOVES)
    assert moves == [move.vm for move in compared.found.moves]


def test_names_do_not_run(browser: chromium.Browser, pages: Path) -> None:
    browser.look()
    for name, shown in (("fleet", (EVIL, BROKEN, "vm <b>&amp;")), ("placement", (EVIL, "vm <b>&amp;"))):
        text = (pages / f"{name}.html").read_text()
        assert EVIL not in text and BROKEN not in text
        browser.open(pages / f"{name}.html")
        browser.run("document.querySelectorAll('details').forEach(e => { e.open = true })")
        seen = browser.run("return document.body.textContent")
        assert all(one in seen for one in shown)
        assert browser.run("return document.querySelectorAll('script').length") == 3
        assert browser.run("return document.querySelectorAll('main img, main b').length") == 0
    browser.open(pages / "fleet.html")
    warned = browser.run("return [...document.querySelectorAll('.warning')].map(e => e.innerText)")
    assert len(warned) == 1 and warned[0].startswith("Partial: 1 file left out.")
    assert EVIL.replace("/", "_") in browser.run("return document.getElementById('left-out').parentElement.innerText")


def test_accessible_and_printed(browser: chromium.Browser, pages: Path) -> None:
    for name in ("fleet", "placement"):
        browser.look()
        browser.open(pages / f"{name}.html")
        tree = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        wanted = {"link", "image", "heading", "region"}
        seen = [node for node in tree if not node.get("ignored") and node["role"].get("value") in wanted]
        assert len(seen) > 12 and all(node.get("name", {}).get("value") for node in seen)
        assert browser.run(TWICE) == []
        levels = browser.run("return [...document.querySelectorAll('h1, h2, h3')].map(e => +e.tagName[1])")
        assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))
        assert browser.run(
            "return [...document.querySelectorAll('figure')].every(e => e.querySelector('details table'))"
        )
        browser.look(dark=True, media="print")
        browser.open(pages / f"{name}.html")
        assert browser.run("return getComputedStyle(document.body).color") == "rgb(26, 34, 48)"
        folded = len(browser.printed())
        browser.run("document.querySelectorAll('details').forEach(e => { e.open = true })")
        assert folded > 0.9 * len(browser.printed())


def test_a_work_cut_short_is_said(answer: Analysis) -> None:
    from dataclasses import replace

    text = fleet_page(replace(answer, ranges=4, ranges_counted=3, left_out=()))
    assert re.search(r"Partial:</strong> the work was cut short\. These are the figures of 3 of 4 ranges", text)
    assert "Files that were left out" not in text
