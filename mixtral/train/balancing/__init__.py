"""Balancing objectives: how they are named, and what they add to a training step."""
