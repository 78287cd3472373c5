"""Methods of the role token router."""
