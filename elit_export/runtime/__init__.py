"""Plans → samples, on NumPy alone.

Takes: a bundle.  Gives: samples, step by step or whole.
May touch: the bundle (reading).
"""
