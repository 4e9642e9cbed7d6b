"""Residual-quantised image generation in JAX and Flax: RQ-VAE and RQ-Transformer (Lee et al., CVPR 2022)."""

__version__ = "0.1.0"
