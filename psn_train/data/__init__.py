"""From files to frames: shards, the order of training, decoding, augmentation."""
