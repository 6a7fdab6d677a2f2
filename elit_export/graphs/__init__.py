"""Model → ONNX graph or torch.export program, in every precision.

Takes: a model, a folder.  Gives: a checked graph with its weights.
May touch: that folder.
"""
