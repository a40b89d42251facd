# SPDX-License-Identifier: Apache-2.0
"""Continues a text with the model that train_moe_lm.py has trained, and says how fast.

    python examples/train_moe_lm.py --steps 200
    python examples/generate.py --prompt "def main(" --num-bytes 200

Takes the options of train_moe_lm.py too, and those of the model must be those it was trained with:
they say which model it is, and where its checkpoint lies (`--out`). The prompt is read at once, or
`--prefill-chunk` bytes at a time; then every byte is a call of a few tokens, of the same layers.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from moe_lm.devices import set_up_devices
from moe_lm.options import Options, parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to write."""

    prompt: str
    copies: int
    num_bytes: int
    temperature: float
    sample_seed: int
    prefill_chunk: int | None


def parse_all(argv: Sequence[str] | None = None) -> tuple[Request, Options]:
    """The options of this program, and those of the model."""
    parser = argparse.ArgumentParser(
        description="Continues a text; takes the options of train_moe_lm.py, too.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--prompt", default="def main(", help="what to continue")
    add("--copies", type=int, default=1, help="sequences that begin with it, at the same time")
    add("--num-bytes", type=int, default=200, help="bytes to write")
    add("--temperature", type=float, default=0.0, help="0: always the likeliest byte")
    add("--sample-seed", type=int, default=0, help="of what is drawn with a temperature")
    add("--prefill-chunk", type=int, default=None, help="bytes of the prompt at a time; none: all")
    own, others = parser.parse_known_args(argv)
    request = Request(**vars(own))
    for name in ("copies", "num_bytes", "prefill_chunk"):
        value = getattr(request, name)
        if value is not None and value < 1:
            parser.error(f"argument --{name.replace('_', '-')}: {value}; allowed: at least 1")
    if not request.prompt:
        parser.error("argument --prompt: ''; allowed: at least one byte")
    if request.temperature < 0:
        parser.error(f"argument --temperature: {request.temperature}; allowed: at least 0")
    options = parse(others)
    if options.processes > 1 or options.cluster:
        parser.error("argument --processes, --cluster: this program is one process")
    return request, options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    request, options = parse_all(argv)
    set_up_devices(options)
    # Only now, because JAX reads the environment when it is imported.
    from moe_lm.serving import serve  # noqa: PLC0415

    return serve(options, **dataclasses.asdict(request))


if __name__ == "__main__":
    sys.exit(main())
