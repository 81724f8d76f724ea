"""Errors of models: a checkpoint that describes none, an argument that is none, and a model that is closed."""

from __future__ import annotations

from rooflama.kernels import RooflamaError


class ConfigError(RooflamaError, ValueError):
    """A checkpoint's metadata or tensors do not describe a model that can be run right."""


class ArgumentError(RooflamaError, ValueError):
    """An argument has a wrong type, or is out of range."""


class ModelClosed(RooflamaError, RuntimeError):
    """A model, or a run of one, was used after it was closed."""
