"""Verbs that write and check outputs: compile, convert, verify; each takes and checks what its user hands in."""
