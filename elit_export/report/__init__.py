"""Reports: facts of checkpoints and bundles, and plots of measurements. Only this room uses matplotlib.

Takes: a bundle, results.  Gives: plain facts, PNG files.
May touch: the file whose path the caller gives.
"""
