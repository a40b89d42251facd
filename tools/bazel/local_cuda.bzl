# SPDX-License-Identifier: Apache-2.0
"""local_cuda and local_nvshmem: what this machine has of CUDA, which may be nothing."""

load(
    ":locate.bzl",
    "ENVIRON",
    "HOW_TO_LOOK_AGAIN",
    "locate",
)

_MINIMUM = 13

_TOOLKIT = """\
load("@rules_cc//cc:cc_library.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])

filegroup(
    name = "nvcc",
    srcs = glob(["cuda/bin/nvcc"], allow_empty = True),
)

filegroup(
    name = "toolkit",
    srcs = glob(
        [
            "cuda/bin/**",
            "cuda/include/**",
            "cuda/nvvm/**",
        ],
        allow_empty = True,
    ),
)

cc_library(
    name = "cuda_headers",
    hdrs = glob(["cuda/include/**"], allow_empty = True),
    includes = ["cuda/include"],
)

# Without the rest, for what is compiled on the fake runtime.
cc_library(
    name = "nvtx",
    hdrs = glob(["cuda/include/nvtx3/**"], allow_empty = True),
    strip_include_prefix = "cuda/include",
)

cc_library(
    name = "cudart_static",
    srcs = glob(["cuda/lib/libcudart_static.a"], allow_empty = True),
    linkopts = [
        "-ldl",
        "-lpthread",
        "-lrt",
    ],
    deps = [":cuda_headers"],
)
"""

_DEFS = """\
\"\"\"Whether this machine has a CUDA compiler, and if not, why.\"\"\"

HAVE_CUDA = {have_cuda}
WHY_NO_CUDA = {why_not}
"""

_HOW = ("Install a CUDA {minimum} toolkit, or NVIDIA's compiler into {python} (pip install the " +
        "six nvidia-* wheels that jax_ep's pyproject.toml names). {again} --{flag}=false builds " +
        "for CPU only.")

def _candidates(rctx, found):
    """Yields what may be nvcc, in the order of cmake/JaxEpCuda.cmake."""
    environ = rctx.os.environ
    candidates = []
    if environ.get("CUDACXX"):
        candidates.append(rctx.which(environ["CUDACXX"]) or rctx.path(environ["CUDACXX"]))
    for name in ["CUDA_HOME", "CUDA_PATH"]:
        if environ.get(name):
            candidates.append(rctx.path(environ[name] + "/bin/nvcc"))
    candidates.append(rctx.which("nvcc"))
    candidates.append(rctx.path("/usr/local/cuda/bin/nvcc"))
    if found.get("cuda"):
        candidates.append(rctx.path(found["cuda"] + "/bin/nvcc"))
    return [nvcc for nvcc in candidates if nvcc and nvcc.exists]

def _root(rctx, nvcc):
    """Returns the toolkit's folder; nvcc may be a link or a script that starts another nvcc."""
    for line in rctx.execute([nvcc, "--dryrun", "-c", "x.cu"]).stderr.split("\n"):
        if line.startswith("#$ TOP="):
            return rctx.path(line[len("#$ TOP="):].strip())
    return nvcc.dirname.dirname

def _release(rctx, nvcc):
    """Returns the release that nvcc says it is of, such as "13.0"."""
    output = rctx.execute([nvcc, "--version"]).stdout
    return output.partition("release ")[2].partition(",")[0]

def _choose(rctx, found):
    """Returns (nvcc, None), or (None, the sentence that says why there is none)."""
    how = _HOW.format(
        again = HOW_TO_LOOK_AGAIN,
        flag = Label("//:cuda"),
        minimum = _MINIMUM,
        python = found.get("python", "a Python"),
    )
    candidates = _candidates(rctx, found)
    if not candidates:
        return None, "no nvcc is found. " + how
    release = _release(rctx, candidates[0])
    major = release.partition(".")[0]
    if not major.isdigit() or int(major) < _MINIMUM:
        return None, "{} is of CUDA '{}', which is too old. {}".format(candidates[0], release, how)
    return candidates[0], None

def _link_toolkit(rctx, root):
    """One layout, whatever the toolkit's: nvcc looks beside itself, and for libraries in lib64."""
    for entry in root.get_child("bin").readdir():
        rctx.symlink(entry, "cuda/bin/" + entry.basename)
    for name in ["include", "nvvm"]:
        rctx.symlink(root.get_child(name), "cuda/" + name)
    lib = root.get_child("lib64")
    for name in ["lib", "lib64"]:
        rctx.symlink(lib if lib.exists else root.get_child("lib"), "cuda/" + name)

def _local_cuda_impl(rctx):
    nvcc, why_not = _choose(rctx, locate(rctx))
    if nvcc:
        _link_toolkit(rctx, _root(rctx, nvcc))
    else:
        # buildifier: disable=print
        print("jax_ep: the CUDA kernels are left out, unless asked for: " + why_not)
    rctx.file("BUILD.bazel", _TOOLKIT)
    rctx.file("defs.bzl", _DEFS.format(have_cuda = bool(nvcc), why_not = repr(why_not)))

local_cuda = repository_rule(
    implementation = _local_cuda_impl,
    configure = True,
    doc = "The CUDA compiler, headers and static runtime; empty targets where there is none.",
    environ = ENVIRON,
    local = True,
)

_NVSHMEM = """\
load("@rules_cc//cc:cc_library.bzl", "cc_library")

cc_library(
    name = "nvshmem",
    srcs = glob(
        [
            "nvshmem/lib/libnvshmem_device.a",
            "nvshmem/lib/libnvshmem_host.so.3",
        ],
        allow_empty = True,
    ),
    hdrs = glob(["nvshmem/include/**"], allow_empty = True),
    includes = ["nvshmem/include"],
    visibility = ["//visibility:public"],
)
"""

_NVSHMEM_DEFS = """\
\"\"\"Why this machine has no NVSHMEM, or None.\"\"\"

WHY_NO_NVSHMEM = {}
"""

def _local_nvshmem_impl(rctx):
    found = locate(rctx)
    home = rctx.os.environ.get("NVSHMEM_HOME") or found.get("nvshmem")
    why_not = None
    library = "lib/libnvshmem_device.a"
    if home and rctx.path(home + "/" + library).exists:
        rctx.symlink(home, "nvshmem")
    elif home:
        why_not = "NVSHMEM_HOME is {}, which has no {}.".format(home, library)
    elif found.get("problem"):
        why_not = found["problem"]
    else:
        why_not = ("{} has no NVSHMEM. Install it there (pip install nvidia-nvshmem-cu13), or set " +
                   "NVSHMEM_HOME. {}").format(found["python"], HOW_TO_LOOK_AGAIN)
    rctx.file("BUILD.bazel", _NVSHMEM)
    rctx.file("defs.bzl", _NVSHMEM_DEFS.format(repr(why_not)))

local_nvshmem = repository_rule(
    implementation = _local_nvshmem_impl,
    configure = True,
    doc = "NVSHMEM, of $NVSHMEM_HOME or of the interpreter's packages.",
    environ = ENVIRON,
    local = True,
)
