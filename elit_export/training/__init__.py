"""Training with a random number of latents at every step, and of the classifier that judges samples.

Takes: images, a ModelSpec.  Gives: weights, errors on held-out images.
May touch: the state file it is named.
"""
