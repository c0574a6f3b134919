"""Weight folders that others wrote, the reference quantizer or its users: description and config.json → a program."""
