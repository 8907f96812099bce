"""Makes the downloading of real checkpoints, which benchmarks share, importable; every test here needs them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
