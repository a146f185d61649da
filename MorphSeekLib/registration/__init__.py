"""The main job: two images in, a transform and a report out."""
