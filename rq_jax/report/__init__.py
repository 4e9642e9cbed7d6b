"""What a person looks at: image grids, curves, progress bars."""
