"""The clusters of a run's heatmaps, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from bias_audit.terminal.findings import short_interval
from bias_audit.terminal.text import COUNT, NAME, WORD, text, wide_table

if TYPE_CHECKING:
    from bias_audit.evidence.clusters import Cluster
    from bias_audit.report.clusters import RunClusters


def print_clusters(console: Console, found: RunClusters, telling: Sequence[Cluster]) -> None:
    """A table of the clusters, the most telling first, and a line for each class without."""
    if telling:
        console.print(_clusters_table(found, telling))
    for one in found.classes:
        if len(one.clusters) < 2:
            alone = one.reason or f"one cluster: no group of its {len(one.samples)} heatmaps stands apart"
            console.print(text(f"Class {one.class_name}: {alone}."))


def _clusters_table(found: RunClusters, telling: Sequence[Cluster]) -> Table:
    table = wide_table(
        f"Heatmaps by {found.method} at step {found.step}",
        **{"class": NAME, "cluster": COUNT, "images": COUNT, "accuracy": WORD},
        what_departs_from_the_class={"ratio": 2},
        nearest_to_its_centre={"ratio": 2},
    )
    for cluster in telling:
        shown = [str(contrast) for contrast in cluster.contrasts if contrast.shown]
        table.add_row(
            text(cluster.class_name),
            str(cluster.number),
            str(len(cluster.members)),
            short_interval(cluster.accuracy),
            text("; ".join(shown) or "nothing beyond chance"),
            text(", ".join(found.ids[i] for i in cluster.nearest)),
        )
    return table
