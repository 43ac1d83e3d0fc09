"""Helpers for files, devices, versions, interrupts and restored attributes; imports no other module of the package."""
