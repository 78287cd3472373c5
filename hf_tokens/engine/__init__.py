"""The surgery: of a model, of a stream of blocks, of a block; and one pass through them."""
