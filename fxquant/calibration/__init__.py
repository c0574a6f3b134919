"""Calibration: observers, smoothing scales and GPTQ over batches, its file, and how it resumes."""
