# SPDX-License-Identifier: Apache-2.0
"""MoE blocks of published models, small and dense, and the same blocks said with jax_ep.

A module per architecture has `init(key) -> params`, `dense(params, x [B, S, H]) -> [B, S, H]` and
`TOPK`: plain JAX, every expert for every token, nothing of jax_ep. They are written from the papers
and model cards. `ports` says each of them with jax_ep, `running` evaluates both.
"""
