"""The towers' threads: their rounds and turns, what the caller's thread passes on to them, their random numbers.

Knows jobs, whatever these do; nothing of modules and batches.
"""
