"""Callbacks of a rollout and of training: they look and steer, and never train."""
