"""The IR: an fx graph on the meta device plus its parameters and recipes; its file, queries and edits."""
