"""The cache layer, and the forms in which entries are stored."""
