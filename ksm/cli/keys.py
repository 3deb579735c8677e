"""Keys of a terminal, one at a time and without waiting for Enter; the terminal is always put back."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

_SEQUENCES = {
    "\x1b[A": "up",
    "\x1b[B": "down",
    "\x1bOA": "up",
    "\x1bOB": "down",
    "\x1b[5~": "page up",
    "\x1b[6~": "page down",
    "\x1b[H": "home",
    "\x1b[F": "end",
    "\x1b[1~": "home",
    "\x1b[4~": "end",
}
_NAMES = {"\x1b": "escape", "\r": "enter", "\n": "enter", "\x7f": "backspace", "\x08": "backspace", " ": "space"}
_LONGEST = 64  # bytes read at once: more than any key sends


def names(text: str) -> Iterator[str]:
    r"""The keys in what a terminal sent: a character as itself, others by name; unknown sequences are left out.

    >>> list(names("q\x1b[A \x1b[99~\x1b"))
    ['q', 'up', 'space', 'escape']
    """
    at = 0
    while at < len(text):
        if text[at] == "\x1b" and at + 1 < len(text) and text[at + 1] in "[O":
            end = at + 2
            while end < len(text) and not text[end].isalpha() and text[end] != "~":
                end += 1
            sequence = text[at : end + 1]
            at = end + 1
            if sequence in _SEQUENCES:
                yield _SEQUENCES[sequence]
            continue
        character = text[at]
        at += 1
        if character in _NAMES:
            yield _NAMES[character]
        elif character.isprintable():
            yield character


class Keys:
    """The keyboard, as a context manager; without a terminal on stdin it only waits.

    Changes of the window's size, and coming back after Ctrl-Z, are the key "resize".

    >>> with Keys() as keys:
    ...     keys.wait(0.0) if not sys.stdin.isatty() else []
    []
    """

    def __init__(self) -> None:
        self._terminal: int | None = None
        self._saved: list[Any] | None = None
        self._woken: tuple[int, int] | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._woken = os.pipe()
        os.set_blocking(self._woken[1], False)
        with contextlib.suppress(ValueError, OSError):  # no stdin, or a closed one
            if sys.stdin.isatty():
                self._terminal = sys.stdin.fileno()
        if self._terminal is not None:
            import termios
            import tty

            self._saved = termios.tcgetattr(self._terminal)
            tty.setcbreak(self._terminal)
        self._handle("SIGWINCH", self._wake)
        self._handle("SIGCONT", self._resume)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._terminal is not None and self._saved is not None:
            import termios

            with contextlib.suppress(termios.error):  # the terminal has gone
                termios.tcsetattr(self._terminal, termios.TCSADRAIN, self._saved)
        if self._woken is not None:
            for descriptor in self._woken:
                os.close(descriptor)

    def _handle(self, name: str, handler: Callable[[int, FrameType | None], None]) -> None:
        with contextlib.suppress(AttributeError, ValueError):  # no such signal here; not in the main thread
            number = getattr(signal, name)
            self._handlers[number] = signal.signal(number, handler)

    def _wake(self, number: int, frame: FrameType | None) -> None:
        if self._woken is not None:
            with contextlib.suppress(BlockingIOError):
                os.write(self._woken[1], b"w")

    def _resume(self, number: int, frame: FrameType | None) -> None:
        """The shell has set the terminal up for itself meanwhile."""
        if self._terminal is not None:
            import tty

            tty.setcbreak(self._terminal)
        self._wake(number, frame)

    def wait(self, seconds: float) -> list[str]:
        """The keys that were pressed, as soon as there are any; none after `seconds`.

        Raises EOFError when the terminal has gone.

        >>> with Keys() as keys:
        ...     keys.wait(0.001) if not sys.stdin.isatty() else []
        []
        """
        assert self._woken is not None
        sources = [self._woken[0]] + ([] if self._terminal is None else [self._terminal])
        ready, _, _ = select.select(sources, [], [], max(0.0, seconds))
        found = []
        if self._woken[0] in ready:
            os.read(self._woken[0], _LONGEST)
            found.append("resize")
        if self._terminal in ready:
            assert self._terminal is not None
            try:
                data = os.read(self._terminal, _LONGEST)
            except OSError:
                data = b""
            if not data:
                raise EOFError
            found += names(data.decode("utf-8", "ignore"))
        return found
