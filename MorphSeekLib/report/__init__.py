"""What a registration leaves behind: files, figures, pictures and the page."""
