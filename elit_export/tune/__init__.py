"""Searches sampling configs under a target of time or quality, and chooses presets among what it found.

Takes: opened plan sets of a bundle, a target, and an evaluator if there is one.  Gives: a result with presets.
May touch: the file of its study. Only this room uses Optuna.
"""
