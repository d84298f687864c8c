"""A transformation like `vmap`, over the windows of a larger array."""
