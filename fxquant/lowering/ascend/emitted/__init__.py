"""Emitted code, copied into model_ascend.py. An edit here changes the files that users deploy."""
