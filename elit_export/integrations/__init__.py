"""Bundles and engines inside other people's tools.

Takes: bundles, engines.  Gives: what a tool calls in place of its own parts.
May touch: the bundle it opens. A tool's library is imported by its own file alone, which is imported on use.
"""
