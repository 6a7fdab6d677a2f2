"""Samples trajectories of a bundle's engines, and computes calibrations from them.

Takes: a pipeline.  Gives: calibration inputs, fits for the step cache, sensitivity of layers.
May touch: the manifest of a bundle.
"""
