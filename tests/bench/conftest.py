"""The benchmarks are no package: they import each other by file name, from their own folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.parent / "bench"))
