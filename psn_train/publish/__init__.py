"""From a checkpoint to people."""
