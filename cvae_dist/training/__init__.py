"""Training a model: the order of the rows, how they arrive, the steps, and what is kept of them."""
