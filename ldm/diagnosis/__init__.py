"""Diagnosis of a trained model: checks that find common mistakes of its training, each with its remedy."""
