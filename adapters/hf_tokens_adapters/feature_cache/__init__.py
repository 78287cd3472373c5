"""Methods of the role feature cache."""
