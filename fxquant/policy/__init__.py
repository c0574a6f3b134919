"""Policies: which scheme, algorithm and transform each layer gets. The shipped ones are in shipped/."""
