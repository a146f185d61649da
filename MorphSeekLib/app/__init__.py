"""The doors: command line, worker of the Slicer module, runs, demo."""
