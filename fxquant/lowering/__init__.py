"""Lowering: graph → files. Layout first, then fill; every writer has its reader."""
