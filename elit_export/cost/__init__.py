"""What a model costs, from its spec alone: every layer, FLOPs, parameters, memory. No torch.

Takes: a ModelSpec, a budget.  Gives: numbers.
May touch: nothing.
"""
