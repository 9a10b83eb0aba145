"""Attention algorithms: the third of the three axes, prior × map × algorithm.

Pure functions of heads and bound feature maps.
"""
