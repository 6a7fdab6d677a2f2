"""Do engines match PyTorch?

Takes: a bundle, its engines.  Gives: comparisons, and where a plan departs.
May touch: the manifest of a bundle that was never verified on its device.
"""
