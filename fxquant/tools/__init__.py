"""The command line: one file a verb. Imports everything, imported by nothing."""
