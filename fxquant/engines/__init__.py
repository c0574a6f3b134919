"""The engines a model can be compiled for: their names, files, headers and contracts."""
