# SPDX-License-Identifier: Apache-2.0
"""Serves the model that train_moe_lm.py has trained: continuous batching, streams over HTTP.

    python examples/serve_moe_lm.py
    curl -N localhost:8000/v1/completions -d '{"prompt": "def main(", "stream": true}'
    python examples/serve_moe_lm.py bench --rate 10 --requests 100 --fail-rank 3@5s
    python examples/serve_moe_lm.py --platform cuda --mesh 1x8 --processes 8

Without a checkpoint it first trains a small model for a minute. It shows how the parts of a server
fit together around expert parallelism in JAX, and what happens when loads change or a rank leaves.
It has no paged cache, no prefix cache, no speculative decoding, no chat templates, no quantized
weights, no batching over several hosts, no separate prefill servers, and no authentication: for
these there are vLLM, SGLang and JetStream. `--help` lists the options.
"""

import sys
from collections.abc import Sequence

from moe_lm.devices import set_up_devices
from moe_serve.options import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    serve, options = parse(sys.argv[1:] if argv is None else argv)
    set_up_devices(options)
    # Only now, because JAX reads the environment when it is imported.
    from moe_serve.run import run  # noqa: PLC0415

    return run(serve, options)


if __name__ == "__main__":
    sys.exit(main())
