"""Frozen networks that judge pictures: each module has `load`, which reads weights, and what applies them."""
