"""Faults that experiments.drill lets a run go through, and what must be left of it."""
