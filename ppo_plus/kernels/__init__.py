"""Replacements of other libraries' forward passes, and the sizes of the batches that run in one pass."""
