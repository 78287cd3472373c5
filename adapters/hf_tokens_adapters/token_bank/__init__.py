"""Methods of the role token bank."""
