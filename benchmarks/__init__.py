"""Speed beside bare loops, exactness beside closed forms, and the scores of the zoo.

Run one as a module from the repository root, e.g. ``python -m benchmarks.coupling``.
"""
