"""Trained softmax models with linear attention: converted and improved."""
