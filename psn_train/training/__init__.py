"""From batches to a checkpoint. `loop.train` is the page that tells the run."""
