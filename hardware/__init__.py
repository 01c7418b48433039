"""Chips: their memories, what a model needs of them, and whether it fits."""
