"""Formulations of products, convolutions and pools for CPUs."""
