"""mixtral: sparse mixture-of-experts language models, from text to trained, compressed and running."""

import os
from typing import TYPE_CHECKING, Any

# How long an idle thread of torch (OpenMP, libgomp) spins before it sleeps: a fraction of a millisecond, not several.
# Beside other load, spinning threads keep the cores from the threads that they wait for; sleeping at once costs 40 % of
# the speed of training on an idle machine (docs/training.md). libgomp looks when torch is loaded, so it stands here.
if "OMP_WAIT_POLICY" not in os.environ:  # the user's own choice
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if TYPE_CHECKING:
    from mixtral.engine import SamplingParams
    from mixtral.llm import LLM
    from mixtral.lm import LM, load
    from mixtral.runtime import set_threads

__version__ = "0.1.0"
__all__ = ["LLM", "LM", "SamplingParams", "load", "set_threads"]


def __getattr__(name: str) -> Any:
    """What `__all__` names, imported when first asked for: `mixtral --help` should not wait for torch."""
    if name == "set_threads":
        from mixtral.runtime import set_threads

        return set_threads
    if name == "LLM":
        from mixtral.llm import LLM

        return LLM
    if name == "SamplingParams":
        from mixtral.engine import SamplingParams

        return SamplingParams
    if name in __all__:
        from mixtral import lm

        return getattr(lm, name)
    raise AttributeError(f"module 'mixtral' has no attribute {name!r}")
