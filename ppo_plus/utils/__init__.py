"""Files, devices, versions and interrupts; imports nothing else of the package."""
