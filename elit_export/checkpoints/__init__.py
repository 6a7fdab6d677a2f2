"""Weights on disk ↔ models. Only this room knows the tensor names of other programs.

Takes: a path.  Gives: a model, or the configuration of a VAE.
May touch: the file or folder it is named.
"""
