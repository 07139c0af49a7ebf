"""Kokoro-82M for salad-lightning."""
