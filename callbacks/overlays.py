"""A heatmap drawn over its image: `bias_audit.overlays`, under the name that it had before the report used it too.

Enters: nothing. Leaves: `overlay` and `SIDE`.
"""

from __future__ import annotations

from bias_audit.overlays import SIDE, overlay

__all__ = ["SIDE", "overlay"]
