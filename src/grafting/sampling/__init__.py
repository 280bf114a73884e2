"""Images drawn from a model, by any number of processes, and the files that hold them."""
