"""The engines a model can be compiled for: each has its names, contract, reader and serving words in one package."""
