"""How a model is trained: the parts of `tt_fast.train`."""
