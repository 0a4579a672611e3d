"""Pairs of small trained models whose relation is known: what comparing checkpoints is measured on.

``families`` says which models there are, ``training`` makes them, ``changes`` makes others from them,
``manifest`` lists the pairs, ``baselines`` are simple ways to compare, ``scores`` judges any way to compare.
"""
