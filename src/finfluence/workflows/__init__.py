"""What users do with runs, in one call each: recipes, the demonstration, cleaning, the report, verification."""

from finfluence._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(  # pyright: ignore[reportUnsupportedDunderAll]
    __name__,
    {
        "finfluence.workflows.cleaning": ("Cleaning", "Rule", "clean"),
        "finfluence.workflows.comparison": ("RunComparison", "compare_runs"),
        "finfluence.workflows.removal": ("RemovalCurve", "removal_curve", "verified"),
        "finfluence.workflows.sources": ("Source", "SourceRows", "read_source", "row_hash"),
        "finfluence.workflows.recipes": ("Recipe", "load_recipe"),
        "finfluence.workflows.report": ("write_report",),
        "finfluence.workflows.verification": ("Verification", "verify", "verify_groups"),
    },
)
