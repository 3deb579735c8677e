"""Bytes, seconds and counts, written for people."""

from __future__ import annotations


def binary(number: float) -> str:
    """Bytes for people.

    >>> binary(1536 * 1024), binary(-5), binary(0)
    ('1.5 MiB', '-5 B', '0 B')
    """
    size = float(number)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    raise AssertionError


def more_or_less(amount: float) -> str:
    """Bytes beside a number that was said.

    >>> more_or_less(2048), more_or_less(-5), more_or_less(-0.0)
    ('+2.0 KiB', '-5 B', '+0 B')
    """
    return f"+{binary(abs(amount))}" if amount > -0.5 else binary(amount)


def clock(seconds: float) -> str:
    """A duration for people.

    >>> clock(0.25), clock(75), clock(5400)
    ('0.25 s', '1 min 15 s', '1 h 30 min')
    """
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    whole = round(seconds / 60)
    return f"{whole // 60} h" + (f" {whole % 60} min" if whole % 60 else "")


def many(number: int, one: str, more: str | None = None) -> str:
    """A count with its noun.

    >>> many(1, "page"), many(2000, "page"), many(0, "process", "processes")
    ('1 page', '2,000 pages', '0 processes')
    """
    return f"{number:,} {one if number == 1 else more or one + 's'}"
