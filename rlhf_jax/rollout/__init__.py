"""Rollouts: sampled responses, their scores, and what an on-policy update needs of them."""
