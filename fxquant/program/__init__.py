"""The IR: an fx graph on the meta device with its parameters and recipes, its file, and what asks and edits it."""
