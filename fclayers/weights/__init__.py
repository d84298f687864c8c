"""Forms of weights, one file per form."""

import fclayers.weights.table  # noqa: F401 (registers the forms)
