"""Folders of the repository, and of the references that may lie beside it."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "tiny_deepseek_v3"
MODEL_FILES = ROOT / "tests" / "model_files"
SUPPORT = ROOT / "tests" / "support"
TRAINED = ROOT.parent / "shared" / "models" / "tiny"
"""A trained model and texts; tests that need them are skipped where they are not."""
REFERENCE = ROOT.parent / "shared" / "conformance" / "msmodelslim"
"""What a reference quantizer wrote; tests that need it are skipped where it is not."""
