"""Deciding what is computed next: continuous batching over a paged KV cache.

The door is ``engine.Engine``; read it first, then ``scheduler``, ``block_pool``, ``model_runner``, ``sampler``.
"""
