"""rlhf_jax: reinforcement learning from human and AI feedback in JAX."""

__version__ = '0.1.0'
