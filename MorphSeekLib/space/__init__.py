"""Displacement algebra, grids and physical space, working grid and intensities."""
