"""The packages that the fleet needs beyond numpy: imported when needed, or an error that says how to get them."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from ksm.errors import UnsupportedError

_NO_WHEEL = {"datasketches": (3, 14)}  # the first Python without a wheel of it; pip then needs a C++ compiler


def need(module: str) -> Any:
    """The module of that name.

    Raises:
        UnsupportedError: its package is not installed; the message says how to get it.

    >>> need("json").dumps([])
    '[]'
    >>> need("no_such_package")
    Traceback (most recent call last):
    ksm.errors.UnsupportedError: the fleet needs the package no_such_package: pip install 'ksm[fleet]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        hint = "pip install 'ksm[fleet]'"
        if package in _NO_WHEEL and sys.version_info >= _NO_WHEEL[package]:
            hint = f"pip install {package} (with a C++ compiler: it has no wheel for this Python)"
        if error.name and error.name.split(".")[0] not in (package, "None"):
            hint += f" ({error})"
        raise UnsupportedError(f"the fleet needs the package {package}: {hint}") from None
