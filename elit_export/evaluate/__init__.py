"""How good samples are, as a classifier of real images sees them.

Takes: pipelines, a classifier.  Gives: distances and agreement with their errors.
May touch: the file of the classifier.
"""
