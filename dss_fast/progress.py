"""Progress bars that never end the work that they show."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm.auto import tqdm


class _Forgiving:
    """The stream of a bar. A terminal that was closed, or a pipe whose reader is gone, loses the bar alone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return 0

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            pass


NOTEBOOK = any("notebook" in kind.__module__ for kind in tqdm.__mro__)  # a widget, which needs no terminal


def bar(shown: bool = True, **options: Any) -> Any:
    """A tqdm bar on stderr with these options, where it is to be shown and there is a terminal or a notebook: in a log
    each of its states would be a line of its own."""
    stream = sys.stderr
    usable = shown and stream is not None and not stream.closed and (NOTEBOOK or stream.isatty())
    return tqdm(disable=not usable, file=_Forgiving(stream) if usable else None, **options)
