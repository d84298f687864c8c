"""Gradients of every example: norms, clipped sums and inner products, without storing them."""
