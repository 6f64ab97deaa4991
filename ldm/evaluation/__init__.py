"""Evaluation: figures of sample quality, reconstructions and restorations, each with its protocol."""
