# SPDX-License-Identifier: Apache-2.0
"""cuda_library: C++ with kernels, compiled by nvcc, one action for each file."""

load("@jax_ep_cuda//:defs.bzl", "WHY_NO_CUDA")
load("@rules_cc//cc:find_cc_toolchain.bzl", "find_cc_toolchain", "use_cc_toolchain")
load("@rules_cc//cc/common:cc_common.bzl", "cc_common")
load("@rules_cc//cc/common:cc_info.bzl", "CcInfo")
load(":cuda.bzl", "NEEDS_CUDA")

# CMake's JAX_EP_CUDA_ARCHS, which says why these; -real is machine code, -virtual is PTX.
CUDA_ARCHITECTURES = [
    "90-real",
    "100-real",
    "90-virtual",
]

_COPTS = [
    "-std=c++20",
    "-O3",
    "-DNDEBUG",
    "-Xcompiler=-fPIC",
    "-Xcompiler=-fvisibility=hidden",
    "-lineinfo",
    "--expt-relaxed-constexpr",
    "-fmad=false",
]

def _gencode(architecture):
    number, _, kind = architecture.partition("-")
    code = {"real": "sm_", "virtual": "compute_"}[kind] + number
    return "-gencode=arch=compute_{},code={}".format(number, code)

def _include_flags(context):
    flags = ["-I" + d for d in context.quote_includes.to_list() + context.includes.to_list()]
    return flags + ["-isystem=" + d for d in context.system_includes.to_list()]

def _compile(ctx, cc_toolchain, src, context):
    # Of files with one name in two folders, an archive would keep one.
    name = src.owner.name.replace("/", "_")
    obj = ctx.actions.declare_file("_cuda/{}/{}.pic.o".format(ctx.label.name, name))
    flags = _COPTS + [_gencode(a) for a in CUDA_ARCHITECTURES]
    ctx.actions.run(
        executable = ctx.files._nvcc[0],
        arguments = ["-ccbin", cc_toolchain.compiler_executable] + flags + ctx.attr.copts +
                    _include_flags(context) + ["-c", src.path, "-o", obj.path],
        inputs = depset(
            [src] + ctx.files.hdrs,
            transitive = [context.headers, cc_toolchain.all_files],
        ),
        tools = ctx.files._toolkit,
        outputs = [obj],
        mnemonic = "Nvcc",
        progress_message = "Compiling " + src.short_path,
        use_default_shell_env = True,
    )
    return obj

def _cuda_library_impl(ctx):
    if WHY_NO_CUDA:
        fail("jax_ep: --{}=true, but {}".format(Label("//:cuda"), WHY_NO_CUDA))
    cc_toolchain = find_cc_toolchain(ctx)
    info = cc_common.merge_cc_infos(cc_infos = [d[CcInfo] for d in ctx.attr.deps])
    context = info.compilation_context
    objects = [_compile(ctx, cc_toolchain, src, context) for src in ctx.files.srcs]
    linking_context, _ = cc_common.create_linking_context_from_compilation_outputs(
        actions = ctx.actions,
        name = ctx.label.name,
        cc_toolchain = cc_toolchain,
        feature_configuration = cc_common.configure_features(
            ctx = ctx,
            cc_toolchain = cc_toolchain,
            requested_features = ctx.features,
            unsupported_features = ctx.disabled_features,
        ),
        compilation_outputs = cc_common.create_compilation_outputs(
            objects = depset(objects),
            pic_objects = depset(objects),
        ),
        linking_contexts = [info.linking_context],
        disallow_dynamic_library = True,
        alwayslink = True,
    )
    own = cc_common.create_compilation_context(headers = depset(ctx.files.hdrs))
    return [
        DefaultInfo(files = depset(objects)),
        cc_common.merge_cc_infos(
            direct_cc_infos = [CcInfo(compilation_context = own, linking_context = linking_context)],
            cc_infos = [CcInfo(compilation_context = context)],
        ),
    ]

_cuda_library = rule(
    implementation = _cuda_library_impl,
    attrs = {
        "copts": attr.string_list(),
        "deps": attr.label_list(providers = [CcInfo]),
        "hdrs": attr.label_list(allow_files = [".h", ".cuh"]),
        "srcs": attr.label_list(allow_files = [".cu"]),
        "_cc_toolchain": attr.label(default = Label("@rules_cc//cc:current_cc_toolchain")),
        "_nvcc": attr.label(default = Label("@jax_ep_cuda//:nvcc"), cfg = "exec"),
        "_toolkit": attr.label(default = Label("@jax_ep_cuda//:toolkit"), cfg = "exec"),
    },
    fragments = ["cpp"],
    toolchains = use_cc_toolchain(),
)

def cuda_library(name, copts = [], **kwargs):
    _cuda_library(
        name = name,
        copts = copts + select({
            "//:werror_true": ["-Werror=all-warnings"],
            "//conditions:default": [],
        }),
        target_compatible_with = NEEDS_CUDA,
        **kwargs
    )
