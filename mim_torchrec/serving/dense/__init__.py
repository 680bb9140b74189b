"""A trained model as a server computes it: the same function by fewer and larger operations, and as one file.

A user behavior model may have a form here, by which a score costs less. It needs none.
"""
