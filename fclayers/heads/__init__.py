"""Losses and predictions of layers with many outputs, computed in chunks of classes."""
