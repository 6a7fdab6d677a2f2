"""Trajectories of a bundle's engines → numbers that later builds and samplings decide by.

Takes: a pipeline.  Gives: calibration inputs, fits for the step cache, sensitivity of layers.
May touch: the manifest of a bundle.
"""
