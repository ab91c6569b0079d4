"""What a run on machines that one has not got would be: batches, memory, traffic, hours, and whether it can be."""
