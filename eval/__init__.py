"""Measure a model's quality and speed."""
