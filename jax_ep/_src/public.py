# SPDX-License-Identifier: Apache-2.0
"""Where public names say that they are: in the module that users import them from."""

from collections.abc import Callable
from typing import Any, TypeVar

_Public = TypeVar("_Public", bound=Callable[..., Any])  # a function or a class


def set_module(module: str) -> Callable[[_Public], _Public]:
    """Makes a function or a class say that it is defined in `module`.

    So that `help()`, reprs and tracebacks speak of `jax_ep.EpUnavailable`, and what is pickled does
    not depend on the file that something is defined in. `inspect.getsource` of a class, which looks
    into the file of its module, does not find it any more; that of a function does.

    Args:
        module: the name of a public module, such as "jax_ep", which gives the name to those who
            ask it: pickle does.
    """

    def decorate(public: _Public) -> _Public:
        public.__module__ = module
        return public

    return decorate
