# SPDX-License-Identifier: Apache-2.0
"""Imports programs of the repository that are no part of a package."""

import importlib.util
import pathlib
from types import ModuleType


def load(path: pathlib.Path) -> ModuleType:
    """The module of a file, which is run as if imported, not as a program."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
