"""What users do with runs, in one call each: recipes, the demonstration, verification by retraining."""

from finfluence._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(  # pyright: ignore[reportUnsupportedDunderAll]
    __name__,
    {
        "finfluence.workflows.recipes": ("Recipe", "load_recipe"),
        "finfluence.workflows.verification": ("Verification", "verify"),
    },
)
