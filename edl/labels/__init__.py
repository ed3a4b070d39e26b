"""What the tokens of a batch count for: masks, packing, labels, and the scope that brings them to routers."""
