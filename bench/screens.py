"""The pictures of docs/report.md, docs/fleet.md and the README: pages and charts of real guests, in Chromium.

python -m bench.screens [DIRECTORY] [--guests DIR]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import ksm
from bench import population
from ksm.fleet import Analysis, Host, Vm, analyze, fingerprint_vm, place, read_fleet
from ksm.fleet.placing import Comparison
from ksm.report import fleet_page, placement_page, plan_page
from tests import chromium

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
VIEWS = (  # page, picture, width, height, where it begins
    ("report", "report-light", 1000, 1360, ""),
    ("report", "report-dark", 1000, 1360, ""),
    ("report", "report-phone", 375, 1360, "host0-fits"),
    ("fleet", "fleet-light", 1000, 1000, ""),
    ("fleet", "fleet-dark", 1000, 980, "shared"),
    ("fleet", "fleet-phone", 375, 1000, "hosts"),
    ("placement", "fleet-placement", 1000, 1240, ""),
)
GIB, MIB = 1 << 30, 1 << 20
HOSTS = 4


def plan(guests: population.Population) -> ksm.Plan:
    """For two kinds of QEMU guests."""
    serve, crunch = guests
    classes = [ksm.VMClass("serve", serve[:6], share=0.75), ksm.VMClass("crunch", crunch[:4], share=0.25)]
    host = ksm.HostSpec(ram=4 * GIB, name="r640", reserve=256 * MIB, vm_overhead=8 * MIB, swap=512 * MIB)
    return ksm.plan(classes, host, ksm.Policy(settle=120))


def fleet(guests: population.Population, directory: Path) -> tuple[Analysis, Comparison]:
    """All guests on four hosts, one after the other, and where they should live."""
    for kind, images in zip(("serve", "crunch"), guests, strict=True):
        for number, image in enumerate(images):
            vm = Vm(name=f"{kind}-{number}", kind=kind, host=f"h{number % HOSTS + 1}", ram=256 * MIB)
            fingerprint_vm(image, directory, vm)
    hosts = [Host(name=f"h{number + 1}", ram=1536 * MIB, vm_overhead=8 * MIB) for number in range(HOSTS)]
    vms, sketches = read_fleet([str(directory)])
    others = {method: place(vms, sketches, hosts, method) for method in ("today", "random", "decreasing", "class")}
    found = place(vms, sketches, hosts)
    return analyze(directory, hosts), Comparison(found=found, others=others, vms=vms, hosts=hosts)


def main(directory: Path, guests: Path | None) -> None:
    """Draw all of them."""
    directory.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        images = population.guests(guests or Path(place, "guests"), 8)
        answer = plan(images)
        found, compared = fleet(images, Path(place, "fleet"))
        pages = {"report": plan_page(answer), "fleet": fleet_page(found), "placement": placement_page(compared)}
        for name, text in pages.items():
            Path(place, f"{name}.html").write_text(text)
        answer.chart("fits").save(directory / "plan-fits.png", scale_factor=1.5)
        answer.chart("composition").save(directory / "plan-composition.svg")
        with chromium.browser(Path(place, "profile")) as browser:
            for page, name, width, height, start in VIEWS:
                browser.look(width, dark=name.endswith("dark"))
                browser.open(Path(place, f"{page}.html"))
                (directory / f"{name}.png").write_bytes(browser.picture(width, height, start))
    print("\n".join([*answer.verdict(), "", *found.verdict(), "", *compared.found.verdict()]))
    for path in sorted(path for kind in ("plan", "report", "fleet") for path in directory.glob(f"{kind}-*")):
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    asked = argparse.ArgumentParser(prog="bench.screens")
    asked.add_argument("directory", nargs="?", type=Path, default=PICTURES)
    asked.add_argument("--guests", type=Path, metavar="DIR", help="keeps the guests' fingerprints")
    how = asked.parse_args()
    main(how.directory, how.guests)
