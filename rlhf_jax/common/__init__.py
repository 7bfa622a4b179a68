"""Shared types, metrics, masked statistics, PRNG streams and shape checks."""
