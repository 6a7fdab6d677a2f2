"""Trains models with a random number of latents at every step, and the classifier of an evaluator.

Takes: images, a ModelSpec.  Gives: weights, errors on held-out images.
May touch: the state file that the caller names.
"""
