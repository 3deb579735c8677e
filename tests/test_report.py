"""The report: plans read back, charts, and the page in a real browser."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ksm
from ksm.charts import DARK, LIGHT
from ksm.cli import main
from ksm.errors import PlanError
from ksm.plan.charts import figures
from ksm.plan.outlook import what_if
from ksm.plan.reading import plan_from, read_plan
from ksm.report import plan_page
from ksm.units import binary, clock
from tests import chromium

PAGE = 4096
EVIL = "<script>alert(1)</script>"


def images(count: int, own: int, seed: int = 0, shared: int = 150) -> list[Any]:
    """Images with pages in common, zero pages, copies within, and pages of their own."""
    random = np.random.default_rng(seed)
    common = random.integers(0, 256, (shared, PAGE), dtype=np.uint8)
    found = []
    for _ in range(count):
        alone = random.integers(0, 256, (own, PAGE), dtype=np.uint8)
        some = common[random.random(len(common)) < 0.8]
        found.append(np.concatenate((some, alone, alone[:10], np.zeros((20, PAGE), np.uint8))))
    return found


@pytest.fixture(scope="module")
def answer() -> ksm.Plan:
    classes = [ksm.VMClass("web", images(4, 60), share=0.75), ksm.VMClass(EVIL, images(3, 90, 1), share=0.25)]
    small = ksm.HostSpec(ram=40 << 20, name="r640", reserve=2 << 20, vm_overhead=50_000, swap=8 << 20)
    # so many VMs that not every number is on the curve, and a kernel without smart scan
    large = ksm.HostSpec(ram=200 << 20, name='"big" & <b>', count=3, nodes=2, kernel="6.1")
    return ksm.plan(classes, [small, large], ksm.Policy(settle=30))


@pytest.fixture(scope="module")
def alone() -> ksm.Plan:
    return ksm.plan(ksm.VMClass("web", images(1, 60)), ksm.HostSpec(ram=40 << 20), simulate=False)


# ---- plans read back -----------------------------------------------------------------------------------


def test_a_plan_read_back_is_the_same(answer: ksm.Plan, alone: ksm.Plan, tmp_path: Path) -> None:
    for number, one in enumerate((answer, alone)):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(one.to_dict()))
        again = read_plan(path)
        assert again.to_dict() == one.to_dict() and again.verdict() == one.verdict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("hosts"), "there is no hosts"),
        (lambda d: d.update(extra=1), "'extra' is not known"),
        (lambda d: d.update(fits=7), "fits is 7"),
        (lambda d: d.update(hosts=[]), "without hosts"),
        (lambda d: d["policy"].update(broken=7), "broken is 7"),
        (lambda d: d["policy"].update(broken="a lot"), "'a lot' is not a float"),
        (lambda d: d["hosts"][0]["host"].update(kernel="x"), "x"),
        (lambda d: d["hosts"][0]["curve"]["need_high"].pop(), "has not a value for each"),
        (lambda d: d["hosts"][0]["curve"]["need_high"].__setitem__(1, None), "need_high is not known everywhere"),
        (lambda d: d["hosts"][0]["curve"]["vms"].__setitem__(1, 0), "do not ascend"),
        (lambda d: d["hosts"][0]["curve"]["vms"].__setitem__(1, 1.5), "not an array"),
        (lambda d: d["hosts"][0]["curve"]["vms"].__setitem__(1, [1]), "not an array"),
        (lambda d: d["hosts"][0]["fits"].update(recommended=1 << 62), "recommended"),
        (lambda d: d["hosts"][0]["settle"]["cold"].pop("99"), "50, 90 and 99"),
        (lambda d: d["hosts"][0]["settle"]["cold"].update(x=1.0), "'x' is not a number"),
        (lambda d: d["hosts"][0]["timelines"][0]["seconds"].pop(), "differ in length"),
        (lambda d: d["hosts"][0]["outlook"]["shares"].__setitem__(0, 0.05), "do not ascend from 0"),
        (lambda d: d["samples"][0].update(zero=-1), "do not add up"),
        (lambda d: d["samples"][0].update(class_name="none"), "which is not among"),
        (lambda d: d["overlap"].pop(), "overlap"),
    ],
)
def test_a_plan_that_lies(answer: ksm.Plan, change: Callable[[Any], Any], message: str) -> None:
    said = copy.deepcopy(answer.to_dict())
    change(said)
    with pytest.raises(PlanError) as caught:
        plan_from(said)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"fits": 1}', "\x00", "[" * 100_000, '{"fits": 1e999}'])
def test_a_file_that_is_no_plan(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    assert main(["report", str(path), "-o", str(tmp_path / "r.html")]) == 65
    printed = capsys.readouterr().err
    assert printed.startswith(f"ksm: {path}: not ") and printed.count("\n") == 1
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]


# ---- what if -------------------------------------------------------------------------------------------


def test_what_if_nothing_changes(answer: ksm.Plan, alone: ksm.Plan) -> None:
    for one in (answer, alone):
        for number, host in enumerate(one.hosts):
            found = one.what_if(number)
            assert found.most == host.fits.recommended and found.fits
            assert found.settle == pytest.approx(host.settle.cold[99], rel=0.01)
            assert found.cpu_cold == pytest.approx(host.settle.cpu_cold, rel=0.01)
            assert found.cpu_steady == pytest.approx(host.settle.cpu_steady, rel=0.01)
            assert found.need == (None if host.frames["need"] is None else pytest.approx(host.frames["need"]))


def test_what_if_agrees_with_another_plan() -> None:
    classes = ksm.VMClass("web", images(4, 60))
    host = ksm.HostSpec(ram=40 << 20, swap=4 << 20)
    policy = ksm.Policy(max_page_sharing=256, use_zero_pages=True)
    first = ksm.plan(classes, host, policy, simulate=False)
    more = ksm.HostSpec(ram=48 << 20, swap=4 << 20)
    for broken in (0.1, 0.75):
        other = ksm.Policy(max_page_sharing=256, use_zero_pages=True, broken=broken)
        again = ksm.plan(classes, more, other, simulate=False)
        found = first.what_if(ram=48 << 20, broken=broken)
        assert abs(found.most - again.fits) <= 1
        there = again.what_if(vms=found.vms)
        assert (found.confident, found.after) == pytest.approx((there.confident, there.after), rel=1e-3)


@pytest.mark.parametrize(
    "asked", [{"host": 2}, {"vms": -1}, {"vms": 1 << 40}, {"ram": 1}, {"broken": 1.5}, {"pages_to_scan": 0}]
)
def test_what_if_refuses(answer: ksm.Plan, asked: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        what_if(answer, **asked)


# ---- charts --------------------------------------------------------------------------------------------


def test_charts_have_the_plans_numbers(answer: ksm.Plan) -> None:
    found = figures(answer, 0)
    rows = found["fits"].chart.to_dict()
    assert json.dumps(rows).count('"without KSM"') == 1
    host = answer.hosts[0]
    at = next(row for row in found["fits"].rows if row[0] == str(host.fits.recommended))
    assert at[1] == binary(host.frames["need"] or 0)
    for sample, row in zip(answer.samples, found["composition"].rows, strict=True):
        assert [row[2], *row[3:]] == [
            f"{n:,}" for n in (sample.pages, sample.zero, sample.within, sample.between, sample.unique)
        ]


def test_pictures(answer: ksm.Plan, alone: ksm.Plan, tmp_path: Path) -> None:
    for one, kind in ((answer, "fits"), (alone, "saving"), (answer, "matrix")):
        one.chart(kind).save(tmp_path / f"{kind}.svg")
        assert (tmp_path / f"{kind}.svg").read_text().startswith("<svg")
    held = io.BytesIO()
    answer.chart("pace", 1).save(held, format="png")
    assert held.getvalue().startswith(b"\x89PNG")
    with pytest.raises(PlanError, match="no chart 'risk' of this plan"):
        answer.chart("risk")
    with pytest.raises(PlanError, match="host 2 of 2"):
        answer.chart("fits", 2)


def test_without_the_extra(answer: ksm.Plan, run_python: Callable[[str], str]) -> None:
    script = """
import sys
for name in ("altair", "jinja2", "vl_convert"):
    sys.modules[name] = None
import ksm
answer = ksm.plan(ksm.VMClass("a", [b"a" * 4096] * 2), ksm.HostSpec(ram=1 << 16), simulate=False)
from ksm.report import plan_page
from ksm.units import binary, clock
for call in (answer.chart, lambda: plan_page(answer)):
    try:
        call()
    except ksm.UnsupportedError as error:
        print(error)
"""
    assert run_python(script).splitlines() == ["charts and reports need altair: pip install 'ksm[report]'"] * 2


def test_results_in_notebooks(answer: ksm.Plan) -> None:
    text = answer._repr_html_()
    assert EVIL not in text and "&lt;script&gt;" in text and "VMs without KSM" in text
    told = ksm.estimate([b"x" * 8192, b"x" * 4096], names=[EVIL, "b"])._repr_html_()
    assert EVIL not in told and "8.0 KiB" in told


def test_colours_have_contrast() -> None:
    """WCAG 2.2 AA: 4.5 to 1 for text, 3 to 1 for what is drawn."""

    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        r, g, b = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    for colors in (LIGHT, DARK):
        for ground in ("page", "panel"):
            for text in ("ink", "soft", "blue", "red"):
                assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
            for drawn in ("grey", "green", "orange"):
                assert contrast(colors[drawn], colors[ground]) >= 3, (drawn, ground)


# ---- the command ---------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for n, image in enumerate(images(3, 60)):
        image.tofile(f"web{n}.raw")
    assert main(["plan", "web0.raw", "web1.raw", "web2.raw", "--ram", "4M", "--json"]) == 0
    Path("plan.json").write_text(capsys.readouterr().out)
    Path("plan.yaml").write_text("{classes: {web: {samples: ['web*.raw']}}, hosts: [{ram: 4M, name: host}]}")
    assert main(["report", "web0.raw", "web1.raw", "web2.raw", "--ram", "4M", "-o", "a.html"]) == 0
    assert main(["report", "plan.json", "-o", "b.html"]) == 0
    assert main(["report", "plan.yaml", "-o", "c.html"]) == 0
    assert "VMs fit on host" in capsys.readouterr().out
    shown = [re.search(r'class="answer">.*?</p>', Path(name).read_text(), re.DOTALL) for name in ("a.html", "b.html")]
    assert shown[0] and shown[1] and shown[0][0] == shown[1][0]
    assert main(["report", "plan.json", "-o", "fits.svg", "--chart", "fits"]) == 0
    assert main(["report", "plan.json", "-o", "fits.png", "--chart", "fits"]) == 0
    assert Path("fits.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", "plan.json", "-o", "a.html"]) == 2  # exists
    assert main(["report", "plan.json", "-o", "a.html", "--force"]) == 0
    assert main(["report", "plan.json", "-o", "a.pdf"]) == 2
    assert main(["report", "plan.json", "-o", "x.svg"]) == 2
    assert main(["report", "plan.json", "-o", "x.svg", "--chart", "no"]) == 65
    assert main(["report", "plan.json", "--ram", "1G", "-o", "x.html"]) == 2
    assert main(["report", "none.json", "-o", "x.html"]) == 66
    assert main(["report", "plan.json", "-o", "nowhere/x.html"]) == 66
    assert not list(tmp_path.glob("x*")) and not list(tmp_path.glob(".*"))


def test_many_samples_keep_the_page_small() -> None:
    random = np.random.default_rng(0)
    common = random.integers(0, 256, (20, PAGE), dtype=np.uint8)
    samples = [np.concatenate((common, random.integers(0, 256, (5, PAGE), dtype=np.uint8))) for _ in range(26)]
    classes = [ksm.VMClass("a", samples[:13]), ksm.VMClass("b", samples[13:])]
    answer = ksm.plan(classes, ksm.HostSpec(ram=2 << 20), simulate=False)
    found = figures(answer)
    for kind in ("composition", "matrix"):
        assert found[kind].note.startswith("26 samples are shown by class")
        assert [row[0] for row in found[kind].rows] == ["a", "b"]
    assert len(plan_page(answer)) < 2_000_000


# ---- in a browser --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    if why := chromium.missing():
        pytest.skip(why)
    with chromium.browser(tmp_path_factory.mktemp("profile")) as session:
        yield session


@pytest.fixture(scope="module")
def page(answer: ksm.Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(plan_page(answer))
    return path


CHARTS = """
const charts = [...document.querySelectorAll('[data-chart]')];
return charts.map(e => [e.dataset.chart, e.querySelectorAll('svg path').length]);
"""
CUT = """
const cut = [];
for (const chart of document.querySelectorAll('.chart')) {
  const frame = chart.getBoundingClientRect();
  for (const text of chart.querySelectorAll('svg text')) {
    const box = text.getBoundingClientRect();
    const out = [frame.left - box.left, box.right - frame.right, frame.top - box.top, box.bottom - frame.bottom];
    if (text.textContent && Math.max(...out) > 1) cut.push([chart.dataset.chart, text.textContent]);
  }
}
return cut;
"""
KEYS = """
const figure = document.getElementById(arguments[0]);
const color = e => getComputedStyle(e.firstChild).backgroundColor;
return [...figure.querySelectorAll('.key span')].map(e => [e.innerText, color(e)]);
"""
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.mark.parametrize(("width", "dark"), [(1180, False), (1180, True), (375, False), (360, True)])
def test_the_page_renders(browser: chromium.Browser, page: Path, width: int, dark: bool) -> None:
    browser.look(width, dark=dark)
    browser.open(page)
    charts = dict(browser.run(CHARTS))
    kinds = ("fits", "saving", "frames", "pace", "cpu")
    assert set(charts) == {f"host{n}-{kind}" for n in (0, 1) for kind in kinds} | {"host0-composition", "host0-matrix"}
    assert all(marks > 3 for marks in charts.values()), charts
    assert browser.run(OVERFLOW) <= 0 and browser.run(CUT) == []
    assert browser.logged() == []
    assert browser.requests() == [page.as_uri()]
    colors = DARK if dark else LIGHT

    def rgb(name: str) -> str:
        return f"rgb({', '.join(str(int(colors[name][at : at + 2], 16)) for at in (1, 3, 5))})"

    assert browser.run("return getComputedStyle(document.body).backgroundColor") == rgb("page")
    rules = "return [...document.querySelectorAll('#host0-fits svg line')].map(e => getComputedStyle(e).stroke)"
    assert rgb("red") in browser.run(rules)
    keys = dict(browser.run(KEYS, "host0-fits"))
    assert (keys["without merging"], keys["merged"], keys["usable RAM"]) == (rgb("grey"), rgb("blue"), rgb("red"))
    drawn = "return [...document.querySelectorAll('#host0-fits svg path')].map(e => getComputedStyle(e).stroke)"
    assert {rgb("grey"), rgb("blue"), rgb("orange")} <= set(browser.run(drawn))
    assert len(browser.run(KEYS, "host0-composition")) == 4


def test_names_do_not_run(browser: chromium.Browser, page: Path) -> None:
    browser.look()
    browser.open(page)
    assert EVIL in browser.run("return document.body.innerText")
    assert browser.run("return document.querySelectorAll('script').length") == 4
    assert EVIL not in page.read_text()
    # and what slipped through all the same would be stopped by the page's policy, as would the network
    browser.run("const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)")
    browser.run("fetch('https://example.org/').catch(() => {})")
    assert browser.run("return window.ran === undefined")
    assert "Content Security Policy" in " ".join(browser.logged())
    assert "https://example.org/" not in browser.requests()


SET = """
const [host, name, value] = arguments, form = document.querySelectorAll('form.whatif')[host];
form.elements[name].value = value;
form.elements[name].dispatchEvent(new Event('input', {bubbles: true}));
"""
FOUND = "const {outlook, ...found} = document.querySelectorAll('form.whatif')[arguments[0]].found; return found"
SHOWN = "return document.querySelectorAll('form.whatif')[arguments[0]].elements[arguments[1]].value"


@pytest.mark.parametrize("host", [0, 1])
def test_controls_agree_with_python(browser: chromium.Browser, page: Path, answer: ksm.Plan, host: int) -> None:
    browser.look()
    browser.open(page)
    size = 1 << 20
    most = int(answer.hosts[host].curve.vms[-1])
    top = int(browser.run("return document.querySelectorAll('form.whatif')[arguments[0]].elements.vms.max", host))
    spec = answer.hosts[host].host
    ram = spec.ram / size
    for vms, mib, pages, broken in (
        (answer.hosts[host].fits.recommended, ram, answer.hosts[host].settle.pages_to_scan, 25),
        (0, ram, 100, 0),
        (1, ram * 0.5, 5000, 100),
        (min(most, top) - 3, ram * 1.5, 777, 33),
        (min(most, top), ram * 2, 20000, 60.5),
    ):
        for name, value in (("vms", vms), ("ram", mib), ("pages_to_scan", pages), ("broken", broken)):
            browser.run(SET, host, name, value)
        found = browser.run(FOUND, host)
        expected = what_if(
            answer, host, vms=vms, ram=round(mib * size), broken=broken / 100, pages_to_scan=pages
        ).to_dict()
        for name, value in expected.items():
            wanted = pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
            assert found[name] == wanted, (name, vms, mib, pages, broken)
        assert browser.run(SHOWN, host, "confident") == binary(expected["confident"])
        assert browser.run(SHOWN, host, "after") == binary(expected["after"])
        assert browser.run(SHOWN, host, "settle") == clock(expected["settle"])
        verdict = browser.run(SHOWN, host, "verdict")
        assert verdict.startswith("✓" if expected["fits"] else "✗") and f"{vms:,} VMs" in verdict
    assert browser.logged() == []


def test_controls_by_keyboard_and_reset(browser: chromium.Browser, page: Path, answer: ksm.Plan) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.look()
    browser.open(page)
    slider = browser.driver.find_element(By.CSS_SELECTOR, "form.whatif [data-for=vms]")
    before = int(browser.run(SHOWN, 0, "vms"))
    slider.send_keys(Keys.ARROW_RIGHT * 60)
    assert int(browser.run(SHOWN, 0, "vms")) > before == answer.hosts[0].fits.recommended
    assert browser.run("return ksm.views['host0-fits'].signal('ksm_vms')") == int(browser.run(SHOWN, 0, "vms"))
    browser.driver.find_element(By.CSS_SELECTOR, "form.whatif button").send_keys(Keys.ENTER)
    assert int(browser.run("return document.querySelector('form.whatif').elements.vms.value")) == before


def test_accessible_names(browser: chromium.Browser, page: Path) -> None:
    browser.look()
    browser.open(page)
    tree = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    wanted = {"slider", "spinbutton", "button", "link", "image", "heading", "table", "form", "region"}
    seen = [node for node in tree if not node.get("ignored") and node["role"].get("value") in wanted]
    nameless = [node for node in seen if not node.get("name", {}).get("value")]
    assert len(seen) > 40 and [n["role"]["value"] for n in nameless if n["role"]["value"] != "table"] == []
    levels = browser.run("return [...document.querySelectorAll('h1, h2, h3')].map(e => +e.tagName[1])")
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    assert browser.run("return document.querySelectorAll('figure').length") == browser.run(
        "return document.querySelectorAll('figure details table').length"
    )


def test_print(browser: chromium.Browser, alone: ksm.Plan, tmp_path: Path) -> None:
    path = tmp_path / "one.html"
    path.write_text(plan_page(alone))
    browser.look(dark=True, media="print")
    browser.open(path)
    assert browser.run("return getComputedStyle(document.body).color") == "rgb(26, 34, 48)"  # light, though it is dark
    assert browser.run("return getComputedStyle(document.querySelector('button')).display") == "none"
    folded = len(browser.printed())
    browser.run("document.querySelectorAll('details').forEach(e => { e.open = true })")
    assert browser.printed().startswith(b"%PDF") and folded > 0.9 * len(browser.printed())  # it was printed unfolded


def test_one_sample_in_a_browser(browser: chromium.Browser, alone: ksm.Plan, tmp_path: Path) -> None:
    path = tmp_path / "one.html"
    path.write_text(plan_page(alone))
    browser.look(390)
    browser.open(path)
    charts = dict(browser.run(CHARTS))
    assert all(charts.values()) and browser.run(OVERFLOW) <= 0 and browser.logged() == []
    assert " to " in browser.run(SHOWN, 0, "need")
    assert "bounds only" in browser.run("return document.body.innerText")


# ---- the examples in docs/ ------------------------------------------------------------------------------

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


@pytest.fixture
def elsewhere(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A directory with three images, and an environment in which `ksm` is a command and a module."""
    for n, image in enumerate(images(3, 60)):
        image.tofile(tmp_path / f"web{n}.raw")
    script = tmp_path / "bin" / "ksm"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom ksm.cli import main\nsys.exit(main())\n")
    script.chmod(0o755)
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    return tmp_path, os.environ | {"PATH": path, "PYTHONPATH": str(Path(ksm.__file__).parents[1])}


def test_example_script(
    elsewhere: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, _ = elsewhere
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["plan_vms.py", "web0.raw", "web1.raw", "web2.raw"])
    runpy.run_path(str(EXAMPLES / "plan_vms.py"))
    printed = capsys.readouterr().out
    assert len(re.findall(r"^\d+ GiB: \d+ VMs without KSM, \d+ with it", printed, re.MULTILINE)) == 3
    assert "pages_to_scan=" in printed and (place / "report.html").stat().st_size > 500_000


def test_example_for_ci(elsewhere: tuple[Path, dict[str, str]]) -> None:
    place, environment = elsewhere

    def run(needed: str, *samples: str) -> tuple[int, str]:
        arguments = ["sh", str(EXAMPLES / "ci.sh"), needed, "4M", *samples]
        done = subprocess.run(arguments, cwd=place, env=environment, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout

    samples = ("web0.raw", "web1.raw", "web2.raw")
    assert run("2", *samples) == (0, "2 VMs fit on 4M\n")
    assert not (place / "report.html").exists()
    code, printed = run("1000", *samples)
    assert code == 3 and "fewer than 1000 VMs fit on 4M" in printed and (place / "report.html").exists()
    assert run("10", "none.raw")[0] not in (0, 3)


def test_notebook(run_python: Callable[[str], str]) -> None:
    """Every cell runs, and prints what the notebook shows."""
    script = f"""
import json, nbclient, nbformat
shown = nbformat.read({str(EXAMPLES / "what-if.ipynb")!r}, 4)
run = nbformat.read({str(EXAMPLES / "what-if.ipynb")!r}, 4)
nbclient.NotebookClient(run, timeout=120, kernel_name="python3").execute()
print(json.dumps([[[o.get("text", sorted(o.get("data", ()))) for o in c.get("outputs", ())] for c in nb.cells]
                  for nb in (shown, run)]))
"""
    shown, run = json.loads(run_python(script).splitlines()[-1])
    assert shown == run and any("VMs fit" in str(cell) for cell in shown)
    assert sum("image/svg+xml" in str(cell) for cell in shown) == 2
