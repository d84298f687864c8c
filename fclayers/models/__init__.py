"""Networks as functions."""

from fclayers.models import vgg

__all__ = ["vgg"]
