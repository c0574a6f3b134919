"""Verbs that write, check and run outputs: compile, convert, verify, run, bench; each checks what a user hands in."""
