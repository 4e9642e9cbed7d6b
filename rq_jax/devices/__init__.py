"""Meshes, hosts, chips and their memory: the only room that knows them."""
