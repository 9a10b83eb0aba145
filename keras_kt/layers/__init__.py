"""Keras layers, where prior, map and algorithm meet."""
