"""Other people's trainers, each behind an optional extra; nothing below this floor knows them."""

from typing import TYPE_CHECKING

from finfluence._lazy import lazy_names

if TYPE_CHECKING:
    from finfluence.integrations import lightning, text, transformers

__getattr__, __dir__, __all__ = lazy_names(
    "finfluence.integrations", {}, submodules=["lightning", "text", "transformers"]
)
