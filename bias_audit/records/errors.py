"""What is wrong with records that cannot be read, or are not there.

A module of its own, below all that reads records.
"""

from __future__ import annotations


class RecordError(ValueError):
    """A run directory that cannot be read: the message names the file, the line and what to do."""


class MissingEvidenceError(RecordError):
    """Evidence that is not there, as opposed to damaged: nothing follows from what was never recorded."""
