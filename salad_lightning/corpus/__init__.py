"""Corpora, prepared offline: manifests to shards."""
