"""Settings of every experiment, as data."""
