"""Checked settings: rules that settings must satisfy, and constructors called with a config section."""
