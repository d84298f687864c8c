"""The type checker of the run that checks the shapes and dtypes in signatures.

Run by `pytest --jaxtyping-packages=fclayers,runtime_types.check`.
"""

from beartype import BeartypeConf, beartype

# An int is a float, as PEP 484 has it.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
