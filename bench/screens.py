"""The pictures of docs/report.md and the README: a plan of real guests, its page in Chromium, two of its charts.

python -m bench.screens [DIRECTORY] [--guests DIR]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import ksm
from bench import population
from ksm.report import plan_page
from tests import chromium

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
VIEWS = (("light", 1000, 1360, ""), ("dark", 1000, 1360, ""), ("phone", 375, 1360, "host0-fits"))
GIB, MIB = 1 << 30, 1 << 20


def plan(directory: Path) -> ksm.Plan:
    """For two kinds of QEMU guests, kept in a directory."""
    serve, crunch = population.guests(directory, 6)
    classes = [ksm.VMClass("serve", serve, share=0.75), ksm.VMClass("crunch", crunch[:4], share=0.25)]
    host = ksm.HostSpec(ram=4 * GIB, name="r640", reserve=256 * MIB, vm_overhead=8 * MIB, swap=512 * MIB)
    return ksm.plan(classes, host, ksm.Policy(settle=120))


def main(directory: Path, guests: Path | None) -> None:
    """Draw all of them."""
    directory.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        answer = plan(guests or Path(place))
        page = Path(place, "report.html")
        page.write_text(plan_page(answer))
        answer.chart("fits").save(directory / "plan-fits.png", scale_factor=1.5)
        answer.chart("composition").save(directory / "plan-composition.svg")
        with chromium.browser(Path(place, "profile")) as browser:
            for name, width, height, start in VIEWS:
                browser.look(width, dark=name == "dark")
                browser.open(page)
                (directory / f"report-{name}.png").write_bytes(browser.picture(width, height, start))
    print("\n".join(answer.verdict()))
    for path in sorted([*directory.glob("plan-*"), *directory.glob("report-*")]):
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    asked = argparse.ArgumentParser(prog="bench.screens")
    asked.add_argument("directory", nargs="?", type=Path, default=PICTURES)
    asked.add_argument("--guests", type=Path, metavar="DIR", help="keeps the guests' fingerprints")
    how = asked.parse_args()
    main(how.directory, how.guests)
