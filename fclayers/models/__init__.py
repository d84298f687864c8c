"""Whole networks as functions."""
