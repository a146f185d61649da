"""The Slicer module's own rooms: engine_client (the worker process), scene (nodes in and out), views, registration.

Nothing here imports torch or MorphSeekLib: the engine runs in its own process.
"""
