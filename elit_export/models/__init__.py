"""The models in PyTorch, and the torch-free table of backbones. Each layer states its kind.

Takes: a ModelSpec.  Gives: modules.
May touch: nothing.
"""
