"""What benchmark.py measures, a module for each of its commands: configurations side by side, and how each is built."""
