"""Compile, front half: options, the program prepared for lowering, and the ledger of source tensors."""
