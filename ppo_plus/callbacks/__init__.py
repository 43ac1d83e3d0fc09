"""Callbacks for rollout events and training events: they observe and set coefficients or control flags."""
