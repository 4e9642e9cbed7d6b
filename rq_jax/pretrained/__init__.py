"""Frozen networks that judge images.

VGG16 for LPIPS; EfficientNet-Lite0 for distances between sets of images; Inception for FID and IS; CLIP for images of
texts; ResNet-101 for rejection sampling.
"""
