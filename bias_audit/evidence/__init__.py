"""From per-image scores to estimates with intervals, one module per kind of evidence."""
