"""Output folder: layout of weight files, description file, manifest."""
