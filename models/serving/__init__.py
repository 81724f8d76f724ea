"""Requests on a loaded model: their turns, their tokens, and how each token is drawn."""
