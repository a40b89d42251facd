# SPDX-License-Identifier: Apache-2.0
"""What programs that XLA has compiled consist of, read from their text."""

import collections
import re

_NAMES = (
    "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
# The arrays that one makes, and its name. An asynchronous one counts where it starts.
COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(_NAMES)})(?:-start)?\(")


def collectives(text: str) -> collections.Counter[str]:
    """How often each of XLA's collectives is in a program, by its name: "all-gather" and so on."""
    return collections.Counter(name for _, name in COLLECTIVE.findall(text))


def operands(text: str) -> dict[str, int]:
    """How many operands each of our calls has, by its name: "plan_dispatch" and so on."""
    calls = re.findall(r"custom-call\((.*?)\), custom_call_target=.jax_ep_(\w+)", text)
    return {name: given.count("%") for given, name in calls}
