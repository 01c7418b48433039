"""The adapter is trained on the quantised weights and stays beside them (QLoRA, Dettmers et al., arXiv 2305.14314).

The weights are computed with as the checkpoint's reader gives them: dequantised, and frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

QUANTISED = True
ARGUMENTS: Mapping[str, Any] = {}
begin = None
