"""Replicas of the user's module: what they are made from, how they follow it, and what forwards in them leave behind.

Knows graphs, but starts no thread and runs neither a forward nor a backward.
"""
