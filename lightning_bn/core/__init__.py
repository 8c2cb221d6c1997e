"""Arithmetic and checks that know no model: moments, population statistics, gaps, ranks, batches."""
