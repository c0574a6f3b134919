"""The files of an output: names and layout, description, manifest."""
