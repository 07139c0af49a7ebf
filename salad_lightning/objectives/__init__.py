"""Objectives: what is minimised at the predicted text tokens."""
