"""MorphSeek's engine: learned deformable registration. Runs without Slicer; README.md says how."""

__version__ = "0.1.0"
