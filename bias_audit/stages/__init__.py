"""The stages of one audit, which `bias_audit.audit` runs in order."""
