"""Weights on disk and models; the only place that knows names that other programs give to tensors.

Takes: a path.  Gives: a model, or the configuration of a VAE.
May touch: the file or folder it is named.
"""
