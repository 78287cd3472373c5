"""Doors above all: measure, calibrate, edit, transplant, load and save."""
