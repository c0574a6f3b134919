"""Recognition of published classes by what their code computes, not by their names."""
