"""The bundled emoji images as a TFDS dataset."""

VERSION = "1.0.0"
CONFIGS = ("72", "256")  # side of the images in pixels
