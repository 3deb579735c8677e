"""Libraries that only some formats need: imported when they are, with an error that says how to get them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ksm.errors import UnsupportedError

# What it is for -> (modules that can do it, best first; the package to install)
_LIBRARIES: Mapping[str, tuple[tuple[str, ...], str]] = MappingProxyType(
    {
        "zstd": (
            ("compression.zstd", "backports.zstd") if sys.version_info >= (3, 14) else ("backports.zstd",),
            "zstd",
        ),
        "snappy": (("cramjam",), "cramjam"),
        "lzo": (("lzallright",), "lzallright"),
    }
)


def load(what: str) -> Any:
    """The module for "zstd", "snappy" or "lzo".

    Raises:
        UnsupportedError: it is not installed.

    >>> load("snappy").__name__
    'cramjam'
    """
    modules, package = _LIBRARIES[what]
    for name in modules:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise UnsupportedError(f"{what} data need the package {package}: pip install 'ksm[dumps]'")
