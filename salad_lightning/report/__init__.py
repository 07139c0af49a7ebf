"""Runs side by side on one page: what was trained, on what, how fast, and what came of it."""
