"""What the random networks of the tests of `slide` are, and how many of them are shared.

python tests/slide_distribution.py [how many, by default 200]
"""

import re
import sys
from collections import Counter

from decoder_networks import decoder_cases
from hypothesis import HealthCheck, Phase, given, settings
from padded_networks import padded_cases

import fclayers as fc

PADDING = re.compile(
    r"SAME_LOWER|SAME|explicit|ceil|jnp\.pad \w+|lax\.pad$|join (?:wrap|mirror|constants)"
)


def draw_cases(strategy, number):
    cases = []

    @settings(
        max_examples=number,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case):
        cases.append(case)

    collect()
    return cases


def describe(case):
    """What is true of a network."""
    padding = [PADDING.search(name) for name in case.layers[:-1]]
    modes = [found.group() for found in padding if found]
    strided = [i for i, name in enumerate(case.layers) if "strided" in name]
    after = [i for i, found in enumerate(padding) if found and strided and i > strided[0]]
    report = fc.explain_slide(case.fun, case.window, stride=case.stride, axes=case.axes)
    true = {
        "all": True,
        "pads": modes,
        "pads twice or more": len(modes) > 1,
        "pads in most layers": 2 * len(modes) >= len(padding),
        "pads after a stride": after,
        "residual or skip": re.search("residual|skip (added|concat)", str(case.layers)),
        "strided windows": max(case.stride) > 1,
        "batch axis": case.image.ndim > len(case.window) + 1,
        "shared": report(case.params, case.image).is_shared,
        f"window axes: {len(case.window)}": True,
        f"head: {case.layers[-1]}": True,
    }
    ups = {name for name in case.layers if name.startswith("up: ")}
    return [name for name, value in true.items() if value] + [*sorted(set(modes)), *sorted(ups)]


def main(number):
    for kind, strategy, share in (
        ("padded networks", padded_cases(), 1),
        ("decoders", decoder_cases(), 4),
    ):
        cases = draw_cases(strategy, number // share)
        counts = Counter(line for case in cases for line in describe(case))
        print(f"\n{kind}")
        for line, count in counts.most_common():
            print(f"  {line:32} {count:5}  {count / len(cases):4.0%}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
