"""Connectors: encoder frames to LLM embeddings, span by span."""
