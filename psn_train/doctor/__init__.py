"""`psn doctor`: what stands in the way of training, on this machine (`machine`) or on all of a launch (`together`)."""
