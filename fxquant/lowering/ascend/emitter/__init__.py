"""Ascend emitter: the text of model_ascend.py, statement by statement, from the fx graph."""
