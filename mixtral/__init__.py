"""mixtral: sparse mixture-of-experts language models, from text to trained and served."""

import os
from typing import TYPE_CHECKING, Any

# Threads of torch (OpenMP) that wait for work sleep at once instead of spinning: beside other load they otherwise keep
# each other from the cores (docs/training.md). OpenMP looks at it when torch is loaded, so it stands here; a
# value of the user's, or GOMP_SPINCOUNT, goes before it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from mixtral.lm import LM, load
    from mixtral.runtime import set_threads

__version__ = "0.1.0"
__all__ = ["LM", "load", "set_threads"]


def __getattr__(name: str) -> Any:
    """What `__all__` names, imported when first asked for: `mixtral --help` should not wait for torch."""
    if name == "set_threads":
        from mixtral.runtime import set_threads

        return set_threads
    if name in __all__:
        from mixtral import lm

        return getattr(lm, name)
    raise AttributeError(f"module 'mixtral' has no attribute {name!r}")
