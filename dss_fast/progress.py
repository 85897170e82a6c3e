"""Progress bars, where tqdm is installed."""

from __future__ import annotations

import warnings
from typing import Any


class Silent:
    """A bar that is not there: it takes what a tqdm bar takes and shows nothing."""

    n, total, initial, unit = 0, None, 0, ""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def _nothing(self, *_: object, **__: object) -> None:
        return None

    update = set_description = set_postfix_str = refresh = close = _nothing


def bar(shown: bool = True, **options: Any) -> Any:
    """A tqdm bar with these options; a silent one when it is not to be shown or tqdm is not installed."""
    if not shown:
        return Silent()
    try:
        from tqdm.auto import tqdm
    except ImportError:
        warnings.warn("no progress bar without tqdm: pip install 'dss_fast[search]'", stacklevel=3)
        return Silent()
    return tqdm(**options)
