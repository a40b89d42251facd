# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one variant of `cpu.py`, which runs this in a process of its own.

Prints one line of JSON, e.g. `python benchmarks/peak_memory.py ours 256x512x32x4`.
"""

import argparse
import json

from ep_bench.cases import DTYPES, Case
from ep_bench.environment import use_host_devices
from ep_bench.memory import probe
from ep_bench.variants import VARIANTS


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("case", type=Case.parse, help="TxHxExK")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="comma-separated")
    parser.add_argument("--backend", choices=("ffi", "xla"), help="of variant `ours`")
    args = parser.parse_args()
    use_host_devices()
    print(json.dumps(probe(args.variant, args.case, args.dtypes.split(","), args.backend)))


if __name__ == "__main__":
    main()
