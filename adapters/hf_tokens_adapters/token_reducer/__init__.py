"""Methods of the role token reducer."""
