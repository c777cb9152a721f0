"""Whole runs through the real Trainer: golden curves, several processes, save and resume, sharding."""
