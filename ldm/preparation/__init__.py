"""Preparation of a folder of images for training: inspection, lists, vocabulary, and configurations."""
