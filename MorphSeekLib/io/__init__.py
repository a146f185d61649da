"""Files in and out: images, transforms, headers, and the one way to write a file."""
