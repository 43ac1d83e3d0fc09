"""Compatibility with files and scripts of other libraries."""
