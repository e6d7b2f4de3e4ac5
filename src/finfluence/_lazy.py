"""Names of a package that are imported on first use (PEP 562), so that reading a run needs no PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, Sequence[str]], *, submodules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The `__getattr__`, `__dir__` and `__all__` of a package whose names load on first use.

    Args:
        package: the package's name.
        homes: module → public names that live there.
        submodules: modules of the package that are public by themselves.
    """
    home_of = {name: home for home, names in homes.items() for name in names}
    public = sorted([*home_of, *submodules])

    def getattribute(name: str) -> Any:
        if name in home_of:
            return getattr(importlib.import_module(home_of[name]), name)
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return getattribute, lambda: list(public), public
