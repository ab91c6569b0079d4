"""A checkpoint -> a file that other programs run: ONNX, torch.export, NIR. `exporting.export_checkpoint` does it."""
