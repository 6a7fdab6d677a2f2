"""Computes what a model costs from its spec alone, without torch: layers, FLOPs, parameters, memory.

Takes: a ModelSpec, a budget.  Gives: numbers.
May touch: nothing.
"""
