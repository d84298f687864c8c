"""`slide`: a transformation like `vmap`, over the overlapping windows of a larger image."""
