"""Files from elsewhere: read, converted to model directories of ours, and written back."""
