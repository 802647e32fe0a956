"""What was measured, and its run directory: written, read, and followed over the audits."""
