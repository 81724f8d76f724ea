"""The integration checklist: what `rooflama.check` runs on a checkpoint."""
