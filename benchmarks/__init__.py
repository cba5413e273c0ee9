"""Whole streams through the real daemon: the demo (`make demo`) and the CLINC150 benchmark."""
