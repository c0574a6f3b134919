"""The front half of compile: options, the program prepared for lowering, and the ledger of source tensors."""
