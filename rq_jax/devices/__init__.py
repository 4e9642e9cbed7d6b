"""Devices: meshes and shardings, processes, memory, peak rates. No other folder knows them."""
