"""How much memory a model takes on a device, before anything is allocated there."""
