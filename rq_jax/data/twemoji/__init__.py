"""The bundled emoji pictures as a TFDS data set."""

VERSION = "1.0.0"
CONFIGS = ("72", "256")  # side of the pictures in pixels
