"""Metadata of influence frames: the meaning of μ's sign and how the figures came about.

Polars frames have no attributes, so the metadata is kept beside the frame for as long as that frame lives and read
through the namespace `finfluence`: `frame.finfluence.meta`. A frame derived from it (filtered, sorted, joined) is a new
frame, of which only the sign convention, true of every influence frame, is known; `attach(new, **metadata(frame))`
carries the rest over.
"""

import weakref
from typing import Any

import polars as pl

from finfluence.tradeoff import SIGN_CONVENTION

# Frames are not hashable, so the store is keyed by identity; a finalizer clears the entry before an identity is reused.
_STORE: dict[int, dict[str, Any]] = {}


def attach(frame: pl.DataFrame, **meta: Any) -> pl.DataFrame:
    """Keep metadata beside a frame for as long as it lives and return the same frame.

    Args:
        frame: any frame.
        **meta: replaces what was attached before; the sign convention is always there as "sign".
    """
    key = id(frame)
    if key not in _STORE:
        weakref.finalize(frame, _STORE.pop, key, None)
    _STORE[key] = {**meta, "sign": SIGN_CONVENTION}
    return frame


def metadata(frame: pl.DataFrame) -> dict[str, Any]:
    """Return a copy of the metadata of a frame; of an unknown one, the sign convention alone."""
    return dict(_STORE.get(id(frame), {"sign": SIGN_CONVENTION}))


@pl.api.register_dataframe_namespace("finfluence")
class InfluenceNamespace:
    """What `frame.finfluence` offers: `meta` and `sign`."""

    def __init__(self, frame: pl.DataFrame) -> None:
        self._frame = frame

    @property
    def meta(self) -> dict[str, Any]:
        """Metadata of the frame, see `metadata`."""
        return metadata(self._frame)

    @property
    def sign(self) -> str:
        """What the sign of μ means, one sentence."""
        return SIGN_CONVENTION
