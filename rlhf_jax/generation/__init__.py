"""Sampling of responses with a key-value cache."""
