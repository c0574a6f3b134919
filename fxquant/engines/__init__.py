"""Engines a model can be compiled for, one package each: names, contract, reader and serving command."""
