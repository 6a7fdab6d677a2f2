"""Facts of checkpoints and bundles, and pictures of what was measured. matplotlib lives here.

Takes: a bundle, results.  Gives: plain facts, PNG files.
May touch: the file it is told to write.
"""
