"""Measurements that any machine can repeat: `psn bench`."""
