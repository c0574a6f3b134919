"""Text for calibration and evaluation: documents, chat templates, token ids."""
