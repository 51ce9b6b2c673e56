"""Extensions: installed packages that add routers, balancing objectives, recipes or data sources (extend.py says how).

They are found by their entry points, and imported when a name is asked for that is not ours: nothing waits for them.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from importlib.metadata import entry_points

from mixtral.errors import MixtralError

GROUP = "mixtral.extensions"  # of entry points; each names a module that registers what it adds when it is imported


def look_for(name: str, known: Collection[str]) -> None:
    """Import the extensions unless `name` is known already. Raises MixtralError for one that cannot be imported."""
    if name not in known:
        load_extensions()


@functools.cache
def load_extensions() -> None:
    """Import the module that each entry point names, once."""
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            package = point.dist.name if point.dist else point.value
            reason = f"{type(error).__name__}: {error}"
            raise MixtralError(f"extension {point.name} of {package} cannot be imported: {reason}") from error
