"""Methods of the role token scorer."""
