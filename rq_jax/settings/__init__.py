"""Checked settings: rules that settings must satisfy, constructors called with a config section, foreign text."""
