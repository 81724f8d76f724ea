"""The integration checklist that ``rooflama.check`` runs on a checkpoint."""
