"""Figures of merit of tokenizers, samples and transformers."""
