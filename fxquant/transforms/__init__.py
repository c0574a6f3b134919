"""Weight transforms that leave the model's function as it is: smoothing scales and shifts, Hadamard rotations."""
