"""Measuring what a model has learnt."""
