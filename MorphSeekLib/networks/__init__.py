"""The registration model around a backbone, its files and its device."""
