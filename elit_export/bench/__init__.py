"""What engines, samplings, caches, backends and memory cost.

Takes: a pipeline.  Gives: results; comparable within one of them only.
May touch: nothing.
"""
