"""The autograd bridge: how a backward of the user's reaches the towers' graphs, and their gradients come back.

Knows tensors, graphs and towers; nothing of replicas and of what modules hold.
"""
