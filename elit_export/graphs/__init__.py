"""Exports models as ONNX graphs or torch.export programs, in every precision.

Takes: a model, a folder.  Gives: a checked graph with its weights.
May touch: that folder.
"""
