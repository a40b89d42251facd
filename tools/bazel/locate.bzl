# SPDX-License-Identifier: Apache-2.0
"""What the repository rules share: they ask the surrounding interpreter what it has."""

# After a change in what is installed, without a change in these: HOW_TO_LOOK_AGAIN.
ENVIRON = [
    "CUDACXX",
    "CUDA_HOME",
    "CUDA_PATH",
    "NVSHMEM_HOME",
    "PATH",
    "PYTHONPATH",
    "PYTHON_BIN_PATH",
    "VIRTUAL_ENV",
]

HOW_TO_CHOOSE = "set PYTHON_BIN_PATH to an interpreter that has it"

# Of what these find, Bazel keeps what it has once found, also that there was nothing.
HOW_TO_LOOK_AGAIN = ("Then run `bazel sync --configure` (with a MODULE.bazel: `bazel fetch " +
                     "--configure --force`), or Bazel does not look again.")

def interpreter(rctx):
    """Finds the surrounding interpreter.

    Args:
      rctx: the repository's context.

    Returns:
      (path, None), or (None, a sentence) if there is none.
    """
    python = rctx.os.environ.get("PYTHON_BIN_PATH") or rctx.which("python3")
    if python:
        return python, None
    return None, ("there is no python3 in PATH. Install Python 3.11 or newer, or set " +
                  "PYTHON_BIN_PATH to it.")

def locate(rctx):
    """Asks the interpreter where its packages are.

    Args:
      rctx: the repository's context.

    Returns:
      What locate.py prints, and under "problem" a sentence if there is no interpreter to ask.
    """
    python, problem = interpreter(rctx)
    if problem:
        return {"problem": problem}
    result = rctx.execute([python, rctx.path(Label("//tools/bazel:locate.py"))])
    if result.return_code:
        return {"problem": ("{} is no Python 3.11 or newer. Set PYTHON_BIN_PATH to one.\n" +
                            "{}{}").format(python, result.stdout, result.stderr)}
    return json.decode(result.stdout)

LOAD_NOT_FOUND = """load(":not_found.bzl", "not_found")\n"""

def link_not_found(rctx):
    """Puts not_found.bzl beside the BUILD file, which then needs to know no other repository."""
    rctx.symlink(Label("//tools/bazel:not_found.bzl"), "not_found.bzl")

def not_found(name, message):
    """Returns the text of a target that fails with a sentence when something depends on it."""
    return """
not_found(
    name = "{}",
    message = {},
    visibility = ["//visibility:public"],
)
""".format(name, repr("{} {}".format(message, HOW_TO_LOOK_AGAIN)))
