"""Checks that engines match PyTorch.

Takes: a bundle, its engines.  Gives: comparisons, and the first node where a plan departs.
May touch: the manifest of a bundle that was never verified on its device.
"""
