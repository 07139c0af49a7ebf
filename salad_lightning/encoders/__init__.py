"""Frozen speech encoders: audio to frames."""
