"""Weights from and to other frameworks, one file each."""
