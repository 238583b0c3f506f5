"""Experiments on real data, one a module."""
