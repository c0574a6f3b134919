"""Command line: one file per verb. Imports everything, imported by nothing."""
