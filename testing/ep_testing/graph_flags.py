# SPDX-License-Identifier: Apache-2.0
"""Values of XLA_FLAGS that decide what XLA makes CUDA graphs of."""

# What is in graphs: as users have it, conditionals too; the same, however short a graph; only the
# kinds that are named; nothing.
DEFAULT = ""
SHORT = "--xla_gpu_graph_min_graph_size=1"
GRAPHS = f"{SHORT} --xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN"
NO_GRAPHS = "--xla_gpu_enable_command_buffer="
FLAGS = {"default": DEFAULT, "short": SHORT, "graphs": GRAPHS, "no_graphs": NO_GRAPHS}
