"""mixtral: sparse mixture-of-experts language models, from text to trained and served."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtral.lm import LM, load

__version__ = "0.1.0"
__all__ = ["LM", "load"]


def __getattr__(name: str) -> Any:
    """`mixtral.load` and `mixtral.LM`, imported when first asked for: `mixtral --help` should not wait for torch."""
    if name in __all__:
        from mixtral import lm

        return getattr(lm, name)
    raise AttributeError(f"module 'mixtral' has no attribute {name!r}")
