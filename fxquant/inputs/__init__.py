"""What a user hands in, before anyone trusts it: limits, paths, JSON and YAML, and the words of validation."""
