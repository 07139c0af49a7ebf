"""Text to speech with word times."""
