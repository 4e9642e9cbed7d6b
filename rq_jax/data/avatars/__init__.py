"""Avatars, plants, planets and landscapes drawn from parameters, each with its caption and attributes."""
