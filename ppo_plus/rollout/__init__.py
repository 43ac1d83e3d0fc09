"""Rollouts: generation, scores and advantages, and the buffer that learning reads."""
