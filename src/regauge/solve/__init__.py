"""Solvers: from facts to generators, one file for each family of groups."""
