"""Benchmarks behind `morphseek benchmark`: the paper's main table and its relatives."""
