# SPDX-License-Identifier: Apache-2.0
"""cuda_library, cuda_shared_library: C++ with kernels, by nvcc, one action for each file."""

load("@jax_ep_cuda//:defs.bzl", "WHY_NO_CUDA")
load("@jax_ep_nvshmem//:defs.bzl", "WHY_NO_NVSHMEM")
load("@rules_cc//cc:find_cc_toolchain.bzl", "find_cc_toolchain", "use_cc_toolchain")
load("@rules_cc//cc/common:cc_common.bzl", "cc_common")
load("@rules_cc//cc/common:cc_info.bzl", "CcInfo")
load(":cuda.bzl", "NEEDS_CUDA", "NEEDS_RDMA")

_ArchitecturesInfo = provider("Of cuda_architectures.", fields = {"names": "a list of strings"})

# The default: CMake's JAX_EP_CUDA_ARCHS, which says why these; -real is machine code, -virtual is PTX.
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

def _cuda_architectures_impl(ctx):
    names = ctx.build_setting_value
    for name in names:
        number, _, kind = name.partition("-")
        if not number or kind not in ["real", "virtual"]:
            fail("jax_ep: --{} has '{}'; expected NUMBER-real or NUMBER-virtual, such as {}".format(
                ctx.label,
                name,
                ", ".join(CUDA_ARCHITECTURES),
            ))

    # For the module that says what it was built for.
    define = "JAX_EP_CUDA_ARCHITECTURES=\"{}\"".format(", ".join(names))
    context = cc_common.create_compilation_context(defines = depset([define]))
    return [_ArchitecturesInfo(names = names), CcInfo(compilation_context = context)]

# A flag of the command line: what cuda_library compiles for.
cuda_architectures = rule(
    implementation = _cuda_architectures_impl,
    build_setting = config.string_list(flag = True),
)

def _include_flags(context):
    flags = ["-I" + d for d in context.quote_includes.to_list() + context.includes.to_list()]
    return flags + ["-isystem=" + d for d in context.system_includes.to_list()]

def _compile(ctx, cc_toolchain, src, context, flags):
    # Of files with one name in two folders, an archive would keep one.
    name = src.owner.name.replace("/", "_")
    obj = ctx.actions.declare_file("_cuda/{}/{}.pic.o".format(ctx.label.name, name))
    ctx.actions.run(
        executable = ctx.files._nvcc[0],
        arguments = ["-ccbin", cc_toolchain.compiler_executable] + _COPTS + flags +
                    ctx.attr.copts + _include_flags(context) + ["-c", src.path, "-o", obj.path],
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

def _checked(ctx):
    if WHY_NO_CUDA:
        fail("jax_ep: --{}=true, but {}".format(Label("//:cuda"), WHY_NO_CUDA))
    return cc_common.merge_cc_infos(cc_infos = [d[CcInfo] for d in ctx.attr.deps])

def _cuda_library_impl(ctx):
    info = _checked(ctx)
    cc_toolchain = find_cc_toolchain(ctx)
    context = info.compilation_context
    flags = [_gencode(a) for a in ctx.attr._architectures[_ArchitecturesInfo].names]
    objects = [_compile(ctx, cc_toolchain, src, context, flags) for src in ctx.files.srcs]
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

_ATTRS = {
    "copts": attr.string_list(),
    "deps": attr.label_list(providers = [CcInfo]),
    "hdrs": attr.label_list(allow_files = [".h", ".cuh"]),
    "srcs": attr.label_list(allow_files = [".cu"]),
    "_architectures": attr.label(default = Label("//:cuda_architectures")),
    "_cc_toolchain": attr.label(default = Label("@rules_cc//cc:current_cc_toolchain")),
    "_nvcc": attr.label(default = Label("@jax_ep_cuda//:nvcc"), cfg = "exec"),
    "_toolkit": attr.label(default = Label("@jax_ep_cuda//:toolkit"), cfg = "exec"),
}

_cuda_library = rule(
    implementation = _cuda_library_impl,
    attrs = _ATTRS,
    fragments = ["cpp"],
    toolchains = use_cc_toolchain(),
)

def _libraries(info):
    """Returns (static libraries, dynamic ones, flags of the linker), each in order."""
    static, dynamic, flags = [], [], []
    for linked in info.linking_context.linker_inputs.to_list():
        for library in linked.libraries:
            archive = library.pic_static_library or library.static_library
            if archive:
                static.append(archive)
            else:
                dynamic.append(library.dynamic_library)
        flags += linked.user_link_flags
    return static, dynamic, flags

def _link(ctx, cc_toolchain, arguments, inputs, output):
    ctx.actions.run(
        executable = ctx.files._nvcc[0],
        arguments = ["-ccbin", cc_toolchain.compiler_executable, "-cudadevrt=none"] + arguments +
                    ["-o", output.path],
        inputs = depset(inputs, transitive = [cc_toolchain.all_files]),
        tools = ctx.files._toolkit,
        outputs = [output],
        mnemonic = "NvccLink",
        progress_message = "Linking " + output.short_path,
        use_default_shell_env = True,
    )

def _cuda_shared_library_impl(ctx):
    if WHY_NO_NVSHMEM:
        fail("jax_ep: --{}=true, but {}".format(Label("//:rdma"), WHY_NO_NVSHMEM))
    info = _checked(ctx)
    cc_toolchain = find_cc_toolchain(ctx)

    # Device code is linked here, by nvcc, with that of the libraries; PTX cannot be.
    names = ctx.attr._architectures[_ArchitecturesInfo].names
    gencode = [_gencode(a) for a in names if a.endswith("-real")]
    if not gencode:
        fail("jax_ep: {} needs an architecture that ends in -real; --{} has {}".format(
            ctx.label,
            ctx.attr._architectures.label,
            ", ".join(names),
        ))
    objects = [
        _compile(ctx, cc_toolchain, src, info.compilation_context, gencode + ["-rdc=true"])
        for src in ctx.files.srcs
    ]
    static, dynamic, flags = _libraries(info)
    device = ctx.actions.declare_file("_cuda/{}/device_code.o".format(ctx.label.name))
    paths = [f.path for f in objects + static]
    _link(
        ctx,
        cc_toolchain,
        ["-dlink", "-Xcompiler=-fPIC"] + gencode + paths,
        objects + static,
        device,
    )
    library = ctx.actions.declare_file(ctx.label.name)

    # nvcc does not take a name that ends in .so.3 for one of a library; the linker does.
    flags = [f.path for f in dynamic] + flags + ctx.attr.linkopts
    _link(
        ctx,
        cc_toolchain,
        ["-shared", "-cudart=none", device.path] + paths + ["-Xlinker=" + f for f in flags],
        [device] + objects + static + dynamic,
        library,
    )
    return [DefaultInfo(files = depset([library]))]

_cuda_shared_library = rule(
    implementation = _cuda_shared_library_impl,
    attrs = dict(_ATTRS, linkopts = attr.string_list()),
    fragments = ["cpp"],
    toolchains = use_cc_toolchain(),
)

def _copts(own):
    return own + select({
        "//:werror_true": ["-Werror=all-warnings"],
        "//conditions:default": [],
    })

def cuda_library(name, copts = [], **kwargs):
    _cuda_library(
        name = name,
        copts = _copts(copts),
        target_compatible_with = NEEDS_CUDA,
        **kwargs
    )

def cuda_shared_library(name, copts = [], **kwargs):
    """Device code of its own, linked with that of NVSHMEM; `name` is the file's."""
    _cuda_shared_library(
        name = name,
        copts = _copts(copts),
        target_compatible_with = NEEDS_RDMA,
        **kwargs
    )
