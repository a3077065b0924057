"""Labelled images: tables, pictures and rules as x with labels, and what a label is."""
