"""What `ksm fingerprint` wrote, as samples of a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ksm
from ksm.cli import main
from ksm.errors import SourceError
from ksm.fleet import Vm, fingerprint_vm
from ksm.fleet.files import write_pages
from ksm.fleet.samples import samples
from ksm.keyed import Key

PAGE = 4096


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    common = random.integers(0, 256, (200, PAGE), dtype=np.uint8)
    for n in range(3):
        own = random.integers(0, 256, (50, PAGE), dtype=np.uint8)
        np.concatenate((common, common[:20], own, np.zeros((30, PAGE), np.uint8))).tofile(f"vm{n}.raw")
    return [f"vm{n}.raw" for n in range(3)]


def planned(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["plan", *arguments, "--ram", "32M", "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


@pytest.mark.parametrize("zeros", ["merge", "absent"])
@pytest.mark.parametrize("asked", ["merge", "absent"])
def test_fingerprints_plan_as_their_images_do(
    zeros: str, asked: str, images: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the zero pages of the dumps were taken for when they were fingerprinted."""
    assert main(["fingerprint", *images, "-o", "prints", "--zeros", zeros]) == 0
    capsys.readouterr()
    one, other = (planned([*given, "--zeros", asked], capsys) for given in (images, ["prints"]))
    assert one["hosts"][0]["fits"] == other["hosts"][0]["fits"]
    assert one["hosts"][0]["frames"] == other["hosts"][0]["frames"] and one["overlap"] == other["overlap"]
    few = [f"prints/{name}.pages.parquet" for name in images[:2]]
    assert planned([*few, images[2], "--zeros", asked], capsys)["hosts"][0]["fits"] == one["hosts"][0]["fits"]


def test_other_keys_and_page_sizes_do_not_mix(images: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for n, key in enumerate((b"k" * 32, b"l" * 32)):
        fingerprint_vm(images[n], f"secret{n}", Vm(name=f"vm{n}"), key=Key.from_bytes(key))
    assert main(["fingerprint", images[2], "-o", "large", "--page-size", "16384"]) == 0
    capsys.readouterr()
    assert planned(["secret0"], capsys)["classes"][0]["samples"] == 1
    for given, message in (
        (["secret0", "vm1.raw"], "under a key"),
        (["secret0", "secret1"], "under a key"),
        (["large", "vm1.raw"], "page sizes differ"),
    ):
        assert main(["plan", *given, "--ram", "32M"]) in (2, 65)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_damaged_and_boastful_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = np.ones((1, 2), np.uint64)
    write_pages(tmp_path / "few.pages.parquet", Vm(name="few", pages=3, contents=1), words, np.array([2]))
    huge = (1 << 31) - 1
    write_pages(tmp_path / "huge.pages.parquet", Vm(name="huge", pages=huge, contents=1), words, np.array([huge]))
    (tmp_path / "cut.pages.parquet").write_bytes((tmp_path / "few.pages.parquet").read_bytes()[:-20])
    for name, message in (("few", "damaged"), ("huge", "a sample can have"), ("cut", "cut.pages.parquet")):
        path = str(tmp_path / f"{name}.pages.parquet")
        with pytest.raises(SourceError, match=message):
            samples([path])
        assert main(["plan", path, "--ram", "32M"]) == 65
        assert capsys.readouterr().err.count("\n") == 1


def test_estimates_from_fingerprints(images: list[str]) -> None:
    for name in images:
        fingerprint_vm(name, "prints", Vm(name=name))
    found, key = samples(["prints"])
    assert key == "" and ksm.estimate(found).pages_sharing == ksm.estimate(images).pages_sharing
