"""The entry points: command line, worker of the Slicer module, training in a folder, demo, doctor."""
