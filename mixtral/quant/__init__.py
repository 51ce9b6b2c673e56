"""Quantisation: formats and layers below the model, the act of quantising above it."""
