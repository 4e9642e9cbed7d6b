"""Building blocks of the networks: convolutional blocks and the causal transformer stack."""
