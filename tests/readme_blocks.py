"""Runs every Python block of the README, with nothing but the standard library and fclayers.

CI runs it where only `pip install .` was done, without the packages that the tests need.
"""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"

if __name__ == "__main__":
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)
    print(f"{len(blocks)} blocks of the README ran")
