"""Softmax attention that can be differentiated twice."""
