"""The main table and its relatives: arms trained on one budget, classical methods, one score, one report."""
