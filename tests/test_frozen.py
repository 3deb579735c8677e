"""A real guest, frozen: every form of its dumps has the same pages; and the kernel merges guests as foretold."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ksm import sources
from ksm.cli import main
from ksm.errors import SourceError
from ksm.sources import QemuImage
from tests import frozen, frozen_criu, frozen_truth
from tests.frozen_forms import ZERO, Forms, Row
from tests.kernel import host
from tests.test_sources import content

MEMORY = 96  # MiB


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[frozen.Guest]:
    if reason := frozen.missing():
        pytest.skip(reason)
    with frozen.booted("ksm-tests-guest", tmp_path_factory.mktemp("guest"), MEMORY) as guest:
        yield guest


@pytest.fixture(scope="module")
def forms(guest: frozen.Guest, tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return Forms(guest, tmp_path_factory.mktemp("forms"))


@pytest.fixture(scope="module")
def states(guest: frozen.Guest, forms: Forms) -> list[Path]:
    return frozen_truth.two_states(guest, forms.folder)


def check(rows: list[Row], fewest: int = MEMORY * 256 - 64) -> None:
    assert rows
    for row in rows:
        assert row.equal == row.compared, row
        assert row.compared + row.absent >= fewest, row


def test_a_real_guest(forms: Forms) -> None:
    """It has memory of every kind: pages of its own, pages that are there twice, and zero pages."""
    assert len(forms.truth) > MEMORY * 256
    contents = set(forms.truth.values())
    assert 5000 < len(contents) < len(forms.truth) - 5000 and ZERO in contents


def test_what_qemu_writes(forms: Forms) -> None:
    rows = list(forms.of_qemu())
    check(rows)
    assert {row.form.split(",")[0] for row in rows} >= {"raw", "ELF core", "kdump-compressed", "live guest"}


def test_what_others_write(forms: Forms) -> None:
    if shutil.which("makedumpfile") is None:
        pytest.skip("makedumpfile is not installed")
    rows = list(forms.of_others(packers=("zstd",)))
    check(rows)
    assert {"makedumpfile -R", "makedumpfile -c", "makedumpfile -l"} <= {row.writer for row in rows}


def test_gcore(forms: Forms) -> None:
    if shutil.which("gcore") is None:
        pytest.skip("gdb is not installed")
    check([forms.of_gcore()])


def test_migration(forms: Forms, states: list[Path]) -> None:
    moved = Forms.of_migration(forms, states[0])
    check(list(moved))


def test_criu(tmp_path: Path) -> None:
    """Pages that were written are there, zeros too; pages that were only read, or not at all, are not."""
    if reason := frozen_criu.why_not():
        pytest.skip(reason)
    with sources.open(frozen_criu.dumped(tmp_path)) as image:
        assert image.format == "CRIU image" and image.anonymous_known
        found = content(image)
    area = range(frozen_criu.AREA, frozen_criu.AREA + frozen_criu.AREA_PAGES * 4096)
    assert {at: page for at, page in found.items() if at in area} == frozen_criu.expected()
    assert image.excluded == {"never mergeable": 2}  # the vDSO


def test_a_guest_by_its_name(forms: Forms, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of it is marked (mem-merge=off): its RAM is what qemu-ram: finds, and nothing else of the process."""
    name = forms.guest.name
    with pytest.raises(SourceError, match="none of its memory is marked mergeable"):
        sources.open(f"qemu:{name}")
    with sources.open(f"qemu-ram:{name}") as image, sources.open(f"pid:{forms.guest.pid}") as everything:
        assert isinstance(image, QemuImage) and image.format == "QEMU guest" and image.pid == forms.guest.pid
        assert sum(segment.length for segment in image.segments) >= (MEMORY + 16) << 20
        assert image.npages < everything.npages
    assert main(["info", f"qemu-ram:{name}"]) == 0
    assert f"qemu-ram:{name}: QEMU guest" in capsys.readouterr().out


@pytest.mark.parametrize("huge", [False, True], ids=["small pages", "huge pages"])
def test_the_kernel_merges_guests_as_foretold(states: list[Path], tmp_path: Path, huge: bool) -> None:
    if reason := host.why_not():
        pytest.skip(reason)
    # On a busy host somebody may hold a page just when ksmd comes by, which then does not merge it in this pass.
    # That does not repeat; a difference does.
    for attempt in range(3):
        (where := tmp_path / str(attempt)).mkdir()
        try:
            outcome = frozen_truth.judged(states, where, huge)
        except host.Unavailable as reason:
            pytest.skip(str(reason))
        if not frozen_truth.differences(outcome):
            break
    assert frozen_truth.differences(outcome) == []
    kernel, foretold = outcome.kernel[-1], outcome.estimate
    assert kernel["pages_sharing"] > 1000
    assert outcome.frames_saved == kernel["pages_sharing"] + outcome.zero_pages_given_back
    told = foretold.pages_shared + foretold.pages_sharing + foretold.pages_unshared
    seen = kernel["pages_shared"] + kernel["pages_sharing"] + kernel["pages_unshared"]
    assert told - seen == outcome.zero_pages_given_back
    if huge:
        if not outcome.huge_pages:
            pytest.skip("this kernel makes no huge pages")
    else:
        assert outcome.huge_pages == outcome.zero_pages_given_back == 0
        assert {name: getattr(foretold, name) for name in frozen_truth.COUNTERS if name != "pages_volatile"} == {
            name: count for name, count in kernel.items() if name != "pages_volatile"
        }


def test_what_is_marked_is_the_guests_ram(states: list[Path], tmp_path: Path) -> None:
    """QEMU marks what it also keeps from fork: so qemu-ram: finds the same blocks where nothing is marked."""
    if reason := host.why_not():
        pytest.skip(reason)
    name = f"ksm-marked-{os.getpid()}"
    with (
        frozen_truth.Host().lock(),
        frozen.Guest(name, tmp_path, merge=True, state=states[0]),
        sources.open(f"qemu:{name}") as marked,
        sources.open(f"qemu-ram:{name}") as ram,
    ):
        assert marked.segments == ram.segments and marked.npages == ram.npages > 0
