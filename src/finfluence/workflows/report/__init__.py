"""The report: one self-contained HTML page of a run, for people who would rather look than read."""

from finfluence._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(  # pyright: ignore[reportUnsupportedDunderAll]
    __name__, {"finfluence.workflows.report._writing": ("write_report",)}
)
