"""Sampling: what is loaded, how it is asked for, what becomes of the pictures."""
