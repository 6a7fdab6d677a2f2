"""Recipe + target → bundle: the one place that joins graphs, backends and verification.

Takes: a recipe and a target.  Gives: a bundle in which each profile was compared with PyTorch, or says why not.
May touch: the bundle folder.
"""
