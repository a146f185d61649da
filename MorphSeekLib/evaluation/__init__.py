"""Figures of a model over the pairs of a data set."""
