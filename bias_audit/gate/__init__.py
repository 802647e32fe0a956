"""Whether a merge may go ahead: a run against its policy, a baseline and other runs."""
