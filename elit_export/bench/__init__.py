"""Measures what engines, whole samplings, step caches, plan sets and memory cost.

Takes: a pipeline.  Gives: results; comparable within one of them only.
May touch: nothing.
"""
