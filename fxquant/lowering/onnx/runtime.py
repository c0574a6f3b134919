"""onnxruntime, with telemetry disabled before its first import: its official builds report use and keep a device id."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime  # noqa: E402

__all__ = ["onnxruntime"]
