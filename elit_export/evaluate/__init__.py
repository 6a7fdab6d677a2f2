"""Measures the quality of samples by the features of a classifier that was trained on real images.

Takes: pipelines, an evaluator.  Gives: distances and agreement with their standard errors.
May touch: the file of the classifier.
"""
