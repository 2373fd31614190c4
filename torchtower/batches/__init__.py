"""Batches: nested values, cut by rows on the way in, joined field by field on the way out.

Knows containers and tensors; nothing of towers' threads, modules and graphs.
"""
