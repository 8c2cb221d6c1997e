"""Arithmetic and checks that know no model."""
