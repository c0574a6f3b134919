"""Bytes on disk: safetensors headers and ranges, hashes, locks, whole reads and writes, work folders."""
