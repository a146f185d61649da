"""What the engine and the Slicer module must agree on; standard library only."""
