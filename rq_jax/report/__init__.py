"""Reports for people: image grids, curves, progress bars, parameter tables."""
