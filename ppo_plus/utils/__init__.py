"""Helpers for files, devices, versions and interrupts; imports no other module of the package."""
