"""s = alpha / sqrt(r) instead of alpha / r, so that a large rank still learns (Kalajdzievski, arXiv 2312.03732)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

QUANTISED = False
ARGUMENTS: Mapping[str, Any] = {"use_rslora": True}
begin = None
