"""Keras runs on JAX here; it reads its backend from the environment when it is imported."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
