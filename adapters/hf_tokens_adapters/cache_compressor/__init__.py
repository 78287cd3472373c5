"""Methods of the role cache compressor."""
