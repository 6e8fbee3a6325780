"""MIMIC for multimodal entity linking."""
