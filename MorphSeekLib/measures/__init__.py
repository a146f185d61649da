"""Similarity, regularizers and the figures by which a registration is judged."""
